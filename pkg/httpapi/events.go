package httpapi

import (
	"net/http"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/labstack/echo/v4"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// acceptedEvent is the JSON of the response for a published event.
type acceptedEvent struct {
	EventID uuid.UUID `json:"event_id"`
}

// eventResult is the JSON of the result for one event of a batch.
type eventResult struct {
	Status  int              `json:"status"`
	EventID *uuid.UUID       `json:"event_id,omitzero"`
	Problem *problem.Details `json:"problem,omitzero"`
}

func (s *Server) publishEvent(c echo.Context, body *input.Object) error {
	event := readEvent(c, body)
	if err := body.Check(eventRules(s.options.Publisher.Validate(event))); err != nil {
		return err
	}
	return s.change(c, body.Raw(), func(tx *sqlx.Tx) (idempotency.Response, error) {
		if err := s.publish(c, tx, event); err != nil {
			return idempotency.Response{}, err
		}
		return responseOf(http.StatusAccepted, "", acceptedEvent{EventID: event.EventID})
	})
}

func (s *Server) publishEvents(c echo.Context, body *input.Object) error {
	batch, err := readBatch(c, body)
	if err != nil {
		return err
	}
	events := make([]outbox.Event, len(batch.items))
	err = batch.each(c.Request().Context(), func(i int, item *input.Object) []input.BrokenRule {
		events[i] = readEvent(c, item)
		return eventRules(s.options.Publisher.Validate(events[i]))
	})
	if err != nil {
		return err
	}
	results := make([]eventResult, len(events))
	valid := make([]outbox.Event, 0, len(events))
	for i, err := range batch.problems {
		if err != nil {
			results[i] = eventResult{Status: http.StatusUnprocessableEntity, Problem: itemProblem(err)}
			continue
		}
		results[i] = eventResult{Status: http.StatusAccepted, EventID: &events[i].EventID}
		valid = append(valid, events[i])
	}
	return s.change(c, body.Raw(), func(tx *sqlx.Tx) (idempotency.Response, error) {
		if err := s.publish(c, tx, valid...); err != nil {
			return idempotency.Response{}, err
		}
		return responseOf(http.StatusOK, "", batchResponse[eventResult]{Data: results})
	})
}

func (s *Server) publish(c echo.Context, tx *sqlx.Tx, events ...outbox.Event) error {
	failpoint.At(failpoint.PublishBefore)
	if err := s.options.Publisher.Publish(c.Request().Context(), tx, events...); err != nil {
		return err
	}
	failpoint.At(failpoint.PublishInserted)
	return nil
}

// readEvent reads an event from the object's members. It keeps the event context
// byte for byte.
func readEvent(c echo.Context, o *input.Object) outbox.Event {
	event := outbox.Event{
		EventID:         uuid.Must(uuid.NewV7()), // crypto/rand does not fail since Go 1.24
		EventType:       o.RequiredString("event_type"),
		EventDateTime:   o.OptionalTime("event_date_time", time.Now()),
		MetadataVersion: o.OptionalInteger("metadata_version", 1),
		Traceparent:     requestOf(c).traceparent,
	}
	if value := o.Required("event_context"); value != nil {
		var err error
		if event.EventContext, err = outbox.ParseJSON(value); err != nil {
			o.Refuse("event_context", err.Error())
		}
	}
	return event
}

// eventRules returns the rules that an event breaks.
func eventRules(broken []*outbox.ValidationError) (rules []input.BrokenRule) {
	for _, rule := range broken {
		rules = append(rules, input.BrokenRule{Name: rule.Field, Reason: rule.Reason})
	}
	return rules
}
