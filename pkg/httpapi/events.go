package httpapi

import (
	"crypto/sha256"
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/labstack/echo/v4"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/users"
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

// newEvent is an event of a request.
type newEvent struct {
	outbox.Event

	// key is the idempotency key of an event whose id the client has chosen. Otherwise its
	// value is empty.
	key idempotency.Key
}

func (s *Server) publishEvent(c echo.Context, body *input.Object) error {
	event := readEvent(c, body)
	if err := body.Check(eventRules(s.options.Publisher.Validate(event.Event))); err != nil {
		return err
	}
	return s.change(c, body.Raw(), func(tx *sqlx.Tx) (idempotency.Response, error) {
		outcomes, err := s.publish(c, tx, []newEvent{event})
		if err != nil {
			return idempotency.Response{}, err
		}
		if errors.Is(outcomes[0], idempotency.ErrMismatch) {
			return idempotency.Response{}, reused(body)
		}
		response, err := responseOf(http.StatusAccepted, "", acceptedEvent{EventID: event.EventID})
		response.Replayed = outcomes[0] != nil
		return response, err
	})
}

func (s *Server) publishEvents(c echo.Context, body *input.Object) error {
	batch, err := readBatch(c, body)
	if err != nil {
		return err
	}
	events := make([]newEvent, len(batch.items))
	err = batch.each(c.Request().Context(), func(i int, item *input.Object) []input.BrokenRule {
		events[i] = readEvent(c, item)
		return eventRules(s.options.Publisher.Validate(events[i].Event))
	})
	if err != nil {
		return err
	}
	valid, indexes := validOf(batch, events)
	return s.change(c, body.Raw(), func(tx *sqlx.Tx) (idempotency.Response, error) {
		outcomes, err := s.publish(c, tx, valid)
		if err != nil {
			return idempotency.Response{}, err
		}
		problems := slices.Clone(batch.problems) // the transaction may be repeated
		for n, i := range indexes {
			if errors.Is(outcomes[n], idempotency.ErrMismatch) {
				problems[i] = reused(batch.items[i])
			}
		}
		if err := batch.whole(problems); err != nil {
			return idempotency.Response{}, err
		}
		results := make([]eventResult, len(events))
		for i, err := range problems {
			results[i] = eventResult{Status: http.StatusAccepted, EventID: &events[i].EventID}
			if err != nil {
				results[i] = eventResult{Status: http.StatusUnprocessableEntity, Problem: itemProblem(err)}
			}
		}
		return responseOf(http.StatusOK, "", batchResponse[eventResult]{Data: results})
	})
}

// reused returns the problem of an event whose id belongs to another event.
func reused(o *input.Object) error {
	return &problem.Error{
		Kind: problem.IdempotencyKeyReused, Detail: "This event_id was used for another event",
		Values: []problem.Value{o.Place("event_id", "was used for another event")},
	}
}

// publish publishes the events. If the client has chosen the id of an event and used it
// before, publish does not publish the event again. For each event, it returns nil,
// idempotency.ErrClaimed or idempotency.ErrMismatch.
func (s *Server) publish(c echo.Context, tx *sqlx.Tx, events []newEvent) ([]error, error) {
	ctx := c.Request().Context()
	failpoint.At(failpoint.PublishBefore)
	outcomes, err := s.claimIDs(c, tx, events)
	if err != nil {
		return nil, err
	}
	unpublished := make([]outbox.Event, 0, len(events))
	for i, event := range events {
		if outcomes[i] == nil {
			unpublished = append(unpublished, event.Event)
		}
	}
	if err := s.options.Publisher.Publish(ctx, tx, unpublished...); err != nil {
		return nil, err
	}
	failpoint.At(failpoint.PublishInserted)
	return outcomes, nil
}

// claimIDs claims the ids that the client has chosen. The second event with an id is the
// repetition of the first.
func (s *Server) claimIDs(c echo.Context, tx *sqlx.Tx, events []newEvent) ([]error, error) {
	outcomes := make([]error, len(events))
	var keys []idempotency.Key
	var indexes []int
	first := map[string]int{}
	for i, event := range events {
		if event.key.Value == "" {
			continue
		}
		if j, ok := first[event.key.Value]; ok {
			outcomes[i] = idempotency.ErrClaimed
			if events[j].key.Fingerprint != event.key.Fingerprint {
				outcomes[i] = idempotency.ErrMismatch
			}
			continue
		}
		first[event.key.Value] = i
		keys, indexes = append(keys, event.key), append(indexes, i)
	}
	if len(keys) == 0 {
		return outcomes, nil
	}
	claimed, err := s.options.Idempotency.Claim(c.Request().Context(), tx, clientOf(c), keys)
	if err != nil {
		return nil, err
	}
	for n, i := range indexes {
		outcomes[i] = claimed[n]
	}
	return outcomes, nil
}

// eventKeyPrefix distinguishes the ids of events from the keys in headers, which are
// printable.
const eventKeyPrefix = "\x1fevent "

// readEvent reads an event from the object's members. It keeps the event context
// byte for byte.
func readEvent(c echo.Context, o *input.Object) newEvent {
	id, chosen := o.OptionalUUID("event_id", uuid.Must(uuid.NewV7())) // crypto/rand does not fail since Go 1.24
	event := newEvent{Event: outbox.Event{
		EventID:         id,
		EventType:       o.RequiredString("event_type"),
		EventDateTime:   o.OptionalTime("event_date_time", time.Now()),
		MetadataVersion: o.OptionalInteger("metadata_version", 1),
		Traceparent:     requestOf(c).traceparent,
	}}
	if chosen {
		event.key = idempotency.Key{Value: eventKeyPrefix + id.String(), Fingerprint: sha256.Sum256(o.Raw())}
	}
	if users.IsEventType(event.EventType) {
		o.Refuse("event_type", "is reserved for the events of this service")
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
