package conformance

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/internal/sample"
)

var inserts = []Case{
	{"an insert stores every field of every event unchanged", func(ctx context.Context, h Harness) error {
		return h.insertAndExpect(ctx, sample.Limits())
	}},
	{"an insert stores contexts of several megabytes byte for byte", func(ctx context.Context, h Harness) error {
		return h.insertAndExpect(ctx, sample.WithContexts(3, 5<<20))
	}},
	// The wire format stores indexes of values in one or two bytes. The numbers are at the
	// limits of both sizes, with and without the empty string.
	distinctValues(255),
	distinctValues(256),
	distinctValues(65_535),
	distinctValues(65_536),
	{"an insert stores an event once for each occurrence in the batch", func(ctx context.Context, h Harness) error {
		events := sample.Events(2)
		sample.AppendFrom(events, events, 1)
		return h.insertAndExpect(ctx, events)
	}},
	{"an insert can run at the same time as other inserts", func(ctx context.Context, h Harness) error {
		const inserts, size = 8, 500
		together := &sink.Events{}
		group, grouped := errgroup.WithContext(ctx)
		for range inserts {
			events := sample.Events(size)
			for i := range size {
				sample.AppendFrom(together, events, i)
			}
			group.Go(func() error { return h.insert(grouped, sample.Token(), events) })
		}
		if err := group.Wait(); err != nil {
			return err //nolint:wrapcheck // the error of the sink
		}
		return h.expectStored(ctx, together, together)
	}},
	{"an insert names the events that cannot be stored, and sends no row of the batch", namesBadEvents},
	{"an insert refuses an empty batch, an empty token and columns of different lengths", refusesMalformedBatches},
	{"an insert returns a permanent error if the server refuses a row because of its data", returnsPermanentErrors},
}

func distinctValues(n int) Case {
	return Case{fmt.Sprintf("an insert stores %d types and environments", n), func(ctx context.Context, h Harness) error {
		events := &sink.Events{}
		for i := range n {
			sample.Append(events, fmt.Sprint("type_", i), time.Unix(0, 0), fmt.Sprint("environment ", i), "{}", 1)
		}
		return h.insertAndExpect(ctx, events)
	}}
}

func namesBadEvents(ctx context.Context, h Harness) error {
	events, unsent := sample.Events(10), sample.Token()
	indexes := []int{3, 7, 9}
	events.EventDateTime[3] = time.Date(0, 12, 31, 23, 59, 59, 999_999_000, time.UTC).UnixMicro()
	events.EventDateTime[7] = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro()
	events.EventDateTime[9] = math.MinInt64
	err := h.insert(ctx, unsent, events)
	bad, ok := errors.AsType[*sink.BadEventsError](err)
	if !ok || sink.ClassOf(err) != sink.Permanent || len(bad.Events) != len(indexes) {
		return fmt.Errorf("a batch with %d bad events is not refused with a permanent *sink.BadEventsError for each of them, but: %w", len(indexes), errOrNil(err))
	}
	for i, index := range indexes {
		if bad.Events[i].Index != index || bad.Events[i].Err == nil {
			return fmt.Errorf("the *sink.BadEventsError does not name event %d: %w", index, err)
		}
	}
	if err := h.expectStored(ctx, events, none); err != nil {
		return err
	}
	// The sink does not know the token yet.
	others := sample.Events(7)
	if err := h.insert(ctx, unsent, others); err != nil {
		return err
	}
	return h.expectStored(ctx, others, others)
}

func refusesMalformedBatches(ctx context.Context, h Harness) error {
	shortened := func(shorten func(e *sink.Events)) sink.Batch {
		events := sample.Events(5)
		shorten(events)
		return sink.Batch{Token: sample.Token(), Events: events}
	}
	for _, malformed := range []struct {
		what  string
		batch sink.Batch
	}{
		{"without events", sink.Batch{Token: sample.Token(), Events: &sink.Events{}}},
		{"without a token", sink.Batch{Token: "", Events: sample.Events(5)}},
		{"with a short event_id", shortened(func(e *sink.Events) { e.EventID = e.EventID[:4] })},
		{"with a short event_type", shortened(func(e *sink.Events) { e.EventType.Indexes = e.EventType.Indexes[:4] })},
		{"with a short event_date_time", shortened(func(e *sink.Events) { e.EventDateTime = e.EventDateTime[:4] })},
		{"with a short environment", shortened(func(e *sink.Events) { e.Environment.Indexes = e.Environment.Indexes[:4] })},
		{"with a short event_context", shortened(func(e *sink.Events) { e.EventContext.Ends = e.EventContext.Ends[:4] })},
		{"with a short metadata_version", shortened(func(e *sink.Events) { e.MetadataVersion = e.MetadataVersion[:4] })},
	} {
		ids := malformed.batch.Events.EventID
		err := h.Sink.Insert(ctx, malformed.batch)
		if err == nil || sink.ClassOf(err) == sink.Permanent {
			return fmt.Errorf("a batch %s is not refused as the relay's own error: %w", malformed.what, errOrNil(err))
		}
		got, err := h.Stored(ctx, ids)
		if err != nil {
			return err
		}
		if got.Len() > 0 {
			return fmt.Errorf("a batch %s is refused, and %d of its rows are stored", malformed.what, got.Len())
		}
	}
	return nil
}

func returnsPermanentErrors(ctx context.Context, h Harness) error {
	const unwanted, secret = "diehard_unwanted", "ada@example.com"
	return h.while(ctx, func() error {
		events := sample.Events(50)
		sample.Append(events, unwanted, time.Unix(0, 0), "Test", `{"email":"`+secret+`"}`, 1)
		err := h.insert(ctx, sample.Token(), events)
		switch {
		case sink.ClassOf(err) != sink.Permanent:
			return fmt.Errorf("a refused row does not cause a permanent error, but: %w", errOrNil(err))
		case strings.Contains(err.Error(), secret):
			return errors.New("the error of a refused row contains its event_context")
		}
		return h.insert(ctx, sample.Token(), sample.Events(50))
	}, func() (Restore, error) { return h.Refuse(ctx, unwanted) })
}

var errNone = errors.New("no error")

// errOrNil returns an error for messages even if there is none.
func errOrNil(err error) error {
	if err == nil {
		return errNone
	}
	return err
}
