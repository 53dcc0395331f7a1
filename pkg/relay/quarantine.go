package relay

import (
	"context"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// setAside separates events of quarantined types from the other events of a batch, before
// the first attempt of the batch. Otherwise each batch with such an event would fail, and
// its other events would wait until they are isolated. It returns false if the batch has
// no such event.
func (d *delivery) setAside(ctx context.Context) (bool, error) {
	if d.lease.Failures > 0 || len(d.o.Store.Quarantine()) == 0 {
		return false, nil
	}
	events := d.events
	quarantined := make([]bool, len(events.EventType.Values))
	for i, eventType := range events.EventType.Values {
		quarantined[i] = d.o.Store.IsQuarantined(eventType)
	}
	var aside, remaining []int64
	for i, id := range events.ID {
		if quarantined[events.EventType.Indexes[i]] {
			aside = append(aside, id)
		} else {
			remaining = append(remaining, id)
		}
	}
	if len(aside) == 0 {
		return false, nil
	}
	if err := d.lease.SetAside(ctx, aside, remaining); err != nil {
		return false, err
	}
	d.log.InfoContext(ctx, "events of quarantined types set aside", "set_aside", len(aside))
	d.work.send(1)
	return true, nil
}

// quarantine puts the event type into quarantine, because several of its events fail and
// none is delivered.
func (d *delivery) quarantine(ctx context.Context, eventType string, cause error) error {
	if d.o.Store.IsQuarantined(eventType) {
		return nil
	}
	if err := d.o.Store.PutIntoQuarantine(ctx, eventType, cause); err != nil {
		return err
	}
	d.Relay.log.ErrorContext(ctx, "event type in quarantine", "event_type", eventType, "err", cause)
	return nil
}

// endQuarantine releases the types of delivered events. An error is no failure of the
// delivery: the next delivery releases the types.
func (d *delivery) endQuarantine(ctx context.Context, events *store.Events) {
	var released []string
	for _, eventType := range events.EventType.Values {
		if d.o.Store.IsQuarantined(eventType) {
			released = append(released, eventType)
		}
	}
	if len(released) == 0 {
		return
	}
	if err := d.o.Store.EndQuarantine(ctx, released); err != nil {
		d.log.WarnContext(ctx, "ending quarantine failed", "err", err)
		return
	}
	d.Relay.log.InfoContext(ctx, "event types released from quarantine", "event_types", released)
	d.work.send(d.o.Workers)
}
