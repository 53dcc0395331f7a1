package conformance

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/internal/sample"
)

var presence = []Case{
	{"a presence check finds exactly the events that are present", findsPresentEvents},
	{"a presence check of more than twenty thousand events is complete", findsManyEvents},
	{"a presence check does not find another event with the same id", distinguishesEqualIDs},
	{"a presence check does not find an event that cannot be stored", findsNoUnstorableEvent},
}

func findsPresentEvents(ctx context.Context, h Harness) error {
	stored, others := sample.Limits(), sample.Events(100)
	// Only the ids differ.
	sameButIDs := sink.Keys{EventID: others.EventID[:stored.Len()], EventType: stored.EventType, EventDateTime: stored.EventDateTime}
	absent := sample.Merge(&sameButIDs, &sample.Events(300).Keys)
	if err := expectPresent(ctx, h.Sink, &stored.Keys, no); err != nil {
		return fmt.Errorf("before the insert: %w", err)
	}
	if err := h.insert(ctx, sample.Token(), stored); err != nil {
		return err
	}
	isStored := func(i int) bool { return i >= absent.Len() }
	for _, s := range slices.Concat([]sink.Sink{h.Sink}, h.Others) {
		for _, expected := range []struct {
			keys    *sink.Keys
			present func(i int) bool
		}{
			{absent, no},
			{&stored.Keys, all},
			{sample.Merge(absent, &stored.Keys), isStored},
			{&sink.Keys{}, no},
		} {
			if err := expectPresent(ctx, s, expected.keys, expected.present); err != nil {
				return err
			}
		}
	}
	return nil
}

func findsManyEvents(ctx context.Context, h Harness) error {
	stored, absent := sample.Events(12_001), sample.Events(10_000)
	if err := h.insert(ctx, sample.Token(), stored); err != nil {
		return err
	}
	return expectPresent(ctx, h.Sink, sample.Merge(&absent.Keys, &stored.Keys), func(i int) bool { return i >= absent.Len() })
}

func distinguishesEqualIDs(ctx context.Context, h Harness) error {
	stored := sample.Events(4)
	if err := h.insert(ctx, sample.Token(), stored); err != nil {
		return err
	}
	queried := sink.Keys{EventID: stored.EventID, EventDateTime: slices.Clone(stored.EventDateTime)}
	queried.EventType.Append([]byte(stored.EventType.At(1) + "_too"))
	for i := 1; i < stored.Len(); i++ {
		queried.EventType.Append([]byte(stored.EventType.At(i)))
	}
	queried.EventDateTime[2]++
	return expectPresent(ctx, h.Sink, &queried, func(i int) bool { return i == 1 || i == 3 })
}

func findsNoUnstorableEvent(ctx context.Context, h Harness) error {
	events := sample.Events(2)
	if err := h.insert(ctx, sample.Token(), events); err != nil {
		return err
	}
	events.EventDateTime[0] = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro()
	events.EventID[0] = uuid.New()
	return expectPresent(ctx, h.Sink, &events.Keys, func(i int) bool { return i == 1 })
}
