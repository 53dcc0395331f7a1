package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/internal/sample"
)

var tokens = []Case{
	{"a token prevents a second insert on every server, and another token does not", keepsTokens},
	{"a token prevents an insert of other rows", preventsOtherRows},
	{"a token covers events of more than a hundred months", coversMonths},
	{"a token that one partition has seen prevents rows of this partition (first event)", coversPartition(0)},
	{"a token that one partition has seen prevents rows of this partition (last event)", coversPartition(99)},
	{"a token is remembered for the whole deduplication window", keepsWindow},
}

func keepsTokens(ctx context.Context, h Harness) error {
	events, seen := sample.Events(100), sample.Token()
	for _, s := range slices.Concat([]sink.Sink{h.Sink, h.Sink, h.Sink}, h.Others) {
		if err := s.Insert(ctx, sample.Batch(seen, events)); err != nil {
			return err
		}
	}
	if err := h.expectStored(ctx, events, events); err != nil {
		return fmt.Errorf("after inserts under one token: %w", err)
	}
	if err := h.insert(ctx, sample.Token(), events); err != nil {
		return err
	}
	if err := h.expectStored(ctx, events, twice(events)); err != nil {
		return fmt.Errorf("after an insert under another token: %w", err)
	}
	return nil
}

func preventsOtherRows(ctx context.Context, h Harness) error {
	// Both batches are in one partition, if a partition has at least a second.
	first, second, seen := sample.Events(1), sample.Events(1), sample.Token()
	if err := h.insert(ctx, seen, first); err != nil {
		return err
	}
	if err := h.insert(ctx, seen, second); err != nil {
		return err
	}
	if err := h.expectStored(ctx, first, first); err != nil {
		return err
	}
	return h.expectStored(ctx, second, none)
}

func coversMonths(ctx context.Context, h Harness) error {
	events, seen := sample.Months(250, 101), sample.Token()
	for range 2 {
		if err := h.insert(ctx, seen, events); err != nil {
			return err
		}
	}
	return h.expectStored(ctx, events, events)
}

// coversPartition inserts a sample of a batch, and then the batch under the same token.
func coversPartition(sampled int) func(ctx context.Context, h Harness) error {
	return func(ctx context.Context, h Harness) error {
		events, one, shared := sample.Events(100), &sink.Events{}, sample.Token()
		numbers, err := h.Sink.Partitions(ctx, &events.Keys)
		if err != nil {
			return err
		}
		if len(numbers) != events.Len() {
			return fmt.Errorf("the partitions of %d events have %d numbers", events.Len(), len(numbers))
		}
		sample.AppendFrom(one, events, sampled)
		for _, batch := range []*sink.Events{one, events} {
			if err := h.insert(ctx, shared, batch); err != nil {
				return err
			}
		}
		covered := &sink.Events{}
		for i := range events.Len() {
			if numbers[i] == numbers[sampled] {
				sample.AppendFrom(covered, events, i)
			}
		}
		return h.expectStored(ctx, covered, one)
	}
}

// windowMonths is the number of partitions of an insert in keepsWindow. ClickHouse
// remembers the token of an insert once for each partition, so this makes the case short.
const windowMonths = 100

// keepsWindow inserts a batch, then other batches until the window is full, then the
// first batch again.
func keepsWindow(ctx context.Context, h Harness) error {
	if h.Window < 1 {
		return errors.New("the harness has no window")
	}
	first, seen := sample.Events(1), sample.Token()
	if err := h.insert(ctx, seen, first); err != nil {
		return err
	}
	for remembered := 1; remembered < h.Window; {
		months := min(windowMonths, h.Window-remembered)
		others := sample.Months(months, months)
		numbers, err := h.Sink.Partitions(ctx, &others.Keys)
		if err != nil {
			return err
		}
		if err := h.insert(ctx, sample.Token(), others); err != nil {
			return err
		}
		slices.Sort(numbers)
		remembered += len(slices.Compact(numbers))
	}
	if err := h.insert(ctx, seen, first); err != nil {
		return err
	}
	if err := h.expectStored(ctx, first, first); err != nil {
		return fmt.Errorf("after %d other inserts: %w", h.Window-1, err)
	}
	return nil
}
