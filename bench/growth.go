package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

const (
	growthEvents = 5 * million
	pinnedEvents = million
	growthBatch  = 10_000 // small, so that there are many cuts
	smallCuts    = 10_000
)

// benchGrowth drains the outbox with the relay's own steps, but without a sink. It
// compares the times of the last tenth of the steps with the first tenth. A poll after
// each cut searches the events of this cut.
func benchGrowth(ctx context.Context, b *bench) error {
	cuts := func(t times) []float64 { return t.cuts }
	claims := func(t times) []float64 { return t.claims }
	polls := func(t times) []float64 { return t.polls }
	for _, c := range []struct {
		about   string
		pinned  bool
		measure func(ctx context.Context, d *database, s *store.Store) (times, error)
		of      func(times) []float64
		figure  string
	}{
		{"a cut while 5 million events drain", false, drainOf(b.scaled(growthEvents, 50*growthBatch), time.Second), cuts, "cut_growth_5m"},
		{"a cut with an old transaction open", true, drainOf(b.scaled(pinnedEvents, 50*growthBatch), time.Second), cuts, "cut_growth_pinned"},
		{"a poll with an old transaction open", true, drainOf(b.scaled(pinnedEvents, 50*growthBatch), 0), polls, "poll_growth_pinned"},
		{"a claim with an old transaction open", true, smallBatches(b.scaled(smallCuts, 100)), claims, "claim_growth_pinned"},
	} {
		first, last := b.newSeries(c.about+": first tenth", "ms"), b.newSeries(c.about+": last tenth", "ms")
		err := b.inRounds(ctx, func(ctx context.Context) error {
			measured, err := b.growth(ctx, c.pinned, c.measure)
			if err != nil {
				return err
			}
			early, late := tenths(c.of(measured))
			first.add(early)
			last.add(late)
			return nil
		})
		if err != nil {
			return err
		}
		first.show(b.out)
		last.show(b.out)
		b.compare(c.figure, last, first)
	}
	return nil
}

// times are the durations of the relay's steps in milliseconds.
type times struct{ cuts, claims, polls []float64 }

func (b *bench) growth(ctx context.Context, pinned bool,
	measure func(context.Context, *database, *store.Store) (times, error),
) (measured times, err error) {
	d, err := b.database(ctx)
	if err != nil {
		return times{}, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	db, err := postgres.Open(postgres.Options{
		DSN: d.dsn, Session: store.Session(store.DefaultFlushTimeout), KeepStatements: true,
	})
	if err != nil {
		return times{}, fmt.Errorf("open the database: %w", err)
	}
	defer db.Close()
	if pinned {
		old, err := d.BeginTxx(ctx, nil)
		if err != nil {
			return times{}, fmt.Errorf("begin the old transaction: %w", err)
		}
		defer func() { _ = old.Rollback() }() // the old transaction only reads
		if _, err := old.ExecContext(ctx, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM outbox_events LIMIT 1"); err != nil {
			return times{}, fmt.Errorf("begin the old transaction: %w", err)
		}
	}
	return measure(ctx, d, store.New(db, store.Options{MaxRows: growthBatch}))
}

// step makes one cut and settles its batches. It returns false if no event was
// waiting.
func (t *times) step(ctx context.Context, s *store.Store) (bool, error) {
	start := time.Now()
	cut, err := s.Cut(ctx, 0)
	if err != nil || cut.Batches == 0 {
		return false, err
	}
	t.cuts = append(t.cuts, since(start))
	for range cut.Batches {
		start := time.Now()
		lease, err := s.Claim(ctx, store.DefaultMaxBytes, true)
		if err != nil {
			return false, err
		}
		if lease == nil {
			return false, errors.New("cannot claim a batch after its cut")
		}
		t.claims = append(t.claims, since(start))
		if err := lease.Settle(ctx); err != nil {
			return false, err
		}
	}
	return true, nil
}

// poll polls as a relay does between cuts.
func (t *times) poll(ctx context.Context, s *store.Store) error {
	start := time.Now()
	if _, err := s.Poll(ctx); err != nil {
		return err
	}
	t.polls = append(t.polls, since(start))
	return nil
}

// since returns milliseconds.
func since(start time.Time) float64 { return time.Since(start).Seconds() * 1e3 }

// drainOf publishes n events and drains them. It polls after each cut, if interval has
// passed.
func drainOf(n int, interval time.Duration) func(context.Context, *database, *store.Store) (times, error) {
	return func(ctx context.Context, d *database, s *store.Store) (t times, err error) {
		if err := d.publishNow(ctx, n); err != nil {
			return times{}, err
		}
		lastPoll := time.Now()
		for more := true; more; {
			if more, err = t.step(ctx, s); err != nil {
				return times{}, err
			}
			if time.Since(lastPoll) >= interval {
				lastPoll = time.Now()
				if err := t.poll(ctx, s); err != nil {
					return times{}, err
				}
			}
		}
		return t, nil
	}
}

func smallBatches(n int) func(context.Context, *database, *store.Store) (times, error) {
	return func(ctx context.Context, d *database, s *store.Store) (t times, err error) {
		lastPoll := time.Now()
		for len(t.claims) < n {
			if _, err := d.ExecContext(ctx, "INSERT INTO outbox_events (event_type, event_context) VALUES ('a', '1')"); err != nil {
				return times{}, fmt.Errorf("publish: %w", err)
			}
			if _, err := t.step(ctx, s); err != nil {
				return times{}, err
			}
			if time.Since(lastPoll) >= time.Second {
				lastPoll = time.Now()
				if err := t.poll(ctx, s); err != nil {
					return times{}, err
				}
			}
		}
		return t, nil
	}
}

// warmUpEvents is the number of events in two batches for each of eight relays.
const warmUpEvents = 16 * blockRows

// benchReplicas compares eight relays with one on the same cores.
func benchReplicas(ctx context.Context, b *bench) (err error) {
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	n := b.scaled(2*million, 4*blockRows)
	// Relays run for days, so the figures exclude the cost of their first batches.
	warmUp := b.scaled(warmUpEvents, 4*blockRows)
	type size struct {
		relays      int
		about       string
		rate, batch *series
	}
	sizes := []size{{relays: 1, about: "1 relay"}, {relays: 8, about: "8 relays"}}
	var cases []func(context.Context) error
	for i := range sizes {
		s := &sizes[i]
		s.rate = b.newSeries("drained by "+s.about, "events/s")
		s.batch = b.newSeries("size of a batch, "+s.about, "events")
		cases = append(cases, d.emptied(func(ctx context.Context) (err error) {
			f, err := d.startFleet(ctx, s.relays)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, f.stop()) }()
			if _, err := f.drain(ctx, typical(warmUp)); err != nil {
				return err
			}
			drained, err := f.drain(ctx, typical(n))
			if err != nil {
				return err
			}
			s.rate.add(float64(n) / drained.took.Seconds())
			s.batch.add(float64(n) / drained.batches)
			return d.expectOnce(ctx, warmUp+n)
		}))
	}
	if err := b.inRounds(ctx, cases...); err != nil {
		return err
	}
	for _, s := range sizes {
		s.rate.show(b.out)
		s.batch.show(b.out)
	}
	b.compare("replicas_8_vs_1", sizes[1].rate, sizes[0].rate)
	b.compare("batch_rows_8_vs_1", sizes[1].batch, sizes[0].batch)
	return nil
}

// benchSize publishes events while a relay drains them. It compares the outbox's
// size on disk after two numbers of events. Autovacuum has its default settings.
func benchSize(ctx context.Context, b *bench) error {
	var sizes [2]*series
	for i, n := range []int{million, 10 * million} {
		sizes[i] = b.newSeries(fmt.Sprintf("size of the outbox after %d million events", n/million), "MB")
		size, err := b.size(ctx, b.scaled(n, 2*blockRows))
		if err != nil {
			return err
		}
		sizes[i].add(size)
		sizes[i].show(b.out)
	}
	b.compare("outbox_size_10m_vs_1m", sizes[1], sizes[0])
	return nil
}

func (b *bench) size(ctx context.Context, n int) (megabytes float64, err error) {
	d, err := b.database(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	relay, err := d.startProgram(ctx, "relay")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, relay.stop()) }()
	// Publish at the relay's speed, so that only a few batches wait.
	const ahead = 4 * blockRows
	for published := 0; published < n; published += blockRows {
		b.at(fmt.Sprintf("published %d of %d events", published, n))
		if err := d.publishNow(ctx, min(blockRows, n-published)); err != nil {
			return 0, err
		}
		if err := d.wake(ctx); err != nil {
			return 0, err
		}
		if err := d.awaitBacklog(ctx, ahead); err != nil {
			return 0, err
		}
	}
	if err := d.awaitDrained(ctx); err != nil {
		return 0, err
	}
	if err := d.expectOnce(ctx, n); err != nil {
		return 0, err
	}
	var bytes float64
	err = d.GetContext(ctx, &bytes, `SELECT sum(pg_total_relation_size(table_name::regclass))
		FROM unnest(ARRAY['outbox_events', 'outbox_batches', 'outbox_cursor']) AS table_name`)
	if err != nil {
		return 0, fmt.Errorf("read the size: %w", err)
	}
	return bytes / 1e6, nil
}

// awaitBacklog waits until the backlog has at most n events.
func (d *database) awaitBacklog(ctx context.Context, n int64) error {
	for {
		var left int64
		err := d.GetContext(ctx, &left, `SELECT pg_sequence_last_value(pg_get_serial_sequence('outbox_events', 'id'))
			- (SELECT max(high_watermark) FROM outbox_cursor) + (SELECT coalesce(sum(event_count), 0) FROM outbox_batches)`)
		if err != nil {
			return fmt.Errorf("read the backlog: %w", err)
		}
		if left <= n {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller has ended the run
		case <-time.After(pollInterval):
		}
	}
}
