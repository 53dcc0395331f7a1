package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/lib/pq"
	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

const latencyTime = 10 * time.Second

// benchLatency publishes events at a steady rate. Every few milliseconds it asks
// PostgreSQL for the events that are still in the outbox. It is the first part of a
// run, and it never truncates its tables.
// See docs/adr/0040-latency-is-measured-in-the-outbox.md.
func benchLatency(ctx context.Context, b *bench) (err error) {
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	// Merges run as in production, because a small insert is slow if thousands
	// of parts exist.
	if _, err := d.sink.ExecContext(ctx, "SYSTEM START MERGES event_log"); err != nil {
		return fmt.Errorf("start merges: %w", err)
	}
	published := 0
	for _, c := range []struct {
		name  string // suffix of the figures' names
		rate  int
		about string
		env   []string
	}{
		{"@1", 1, "1 event/s", nil},
		{"@100", 100, "100 events/s", nil},
		{"@1000", 1000, "1,000 events/s", nil},
		{"@5000", 5000, "5,000 events/s", nil},
		{"_linger_10ms@1000", 1000, "1,000 events/s, linger 10 ms", []string{"DIEHARD_RELAY_LINGER=10ms"}},
	} {
		p50, p99 := b.newSeries("commit to queryable, median, "+c.about, "ms"), b.newSeries("commit to queryable, p99, "+c.about, "ms")
		n := max(1, int(float64(c.rate)*b.during(latencyTime).Seconds()))
		if err := d.measureLatency(ctx, c.rate, n, c.env, p50, p99); err != nil {
			return err
		}
		published += b.rounds * n
		p50.show(b.out)
		p99.show(b.out)
		b.figure("delivery_p50_ms"+c.name, p50.median())
		b.figure("delivery_p99_ms"+c.name, p99.median())
	}
	return d.expectOnce(ctx, published)
}

func (d *database) measureLatency(ctx context.Context, rate, n int, env []string, p50, p99 *series) (err error) {
	relay, err := d.startProgram(ctx, "relay", env...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, relay.stop()) }()
	return d.bench.inRounds(ctx, func(ctx context.Context) error {
		// Without this pause, the linger after the previous round would delay
		// the first event.
		if err := pause(ctx, time.Second); err != nil {
			return err
		}
		latencies, err := d.latencies(ctx, rate, n)
		if err != nil {
			return err
		}
		p50.add(percentile(latencies, 0.5))
		p99.add(percentile(latencies, 0.99))
		return d.awaitDrained(ctx) // includes events that are not watched
	})
}

// watched holds the events whose latency is measured.
type watched struct {
	mu        sync.Mutex
	waiting   map[int64]time.Time // commit times of the events in the outbox, by id
	latencies []float64           // of the events that have left the outbox, in milliseconds
}

// watchRate is the largest number of events per second that are measured. The other
// events only add load. watchInterval is the pause between two polls.
const (
	watchRate     = 100
	watchInterval = 2 * time.Millisecond
	watchPatience = time.Minute
)

// latencies publishes n events one by one at the rate and returns their
// latencies.
func (d *database) latencies(ctx context.Context, rate, n int) ([]float64, error) {
	// A prepared INSERT takes little CPU time. The publisher and the relay share
	// the CPUs.
	insert, err := d.PreparexContext(ctx, insertEvent+" RETURNING id") //nolint:sqlclosecheck // closed below
	if err != nil {
		return nil, fmt.Errorf("prepare the INSERT: %w", err)
	}
	defer insert.Close()
	w := &watched{waiting: make(map[int64]time.Time)}
	notifier := outbox.NewNotifier(d.DB.DB, quietLog)
	publishing, done := context.WithCancel(ctx)
	defer done()
	group, ctx := errgroup.WithContext(ctx)
	ctx, stop := context.WithCancel(ctx)
	group.Go(func() error { return notifier.Run(ctx) })
	group.Go(func() error {
		defer stop()
		return w.poll(ctx, publishing, d)
	})

	producers, producing := errgroup.WithContext(ctx)
	producers.SetLimit(20)
	start := time.Now()
	for i := range n {
		time.Sleep(time.Until(start.Add(time.Duration(i) * time.Second / time.Duration(rate))))
		if producing.Err() != nil {
			break
		}
		producers.Go(func() error {
			event, err := newEvent(i)
			if err != nil {
				return err
			}
			var id int64
			err = insert.GetContext(producing, &id, event.EventID, event.EventType, event.EventDateTime, "Local",
				event.EventContext.String(), event.MetadataVersion, nil)
			if err != nil {
				return fmt.Errorf("publish an event: %w", err)
			}
			if rate <= watchRate || i%(rate/watchRate) == 0 {
				w.committed(id)
			}
			notifier.Hint()
			return nil
		})
	}
	err = producers.Wait()
	done() // polling continues until all committed events have left the outbox
	err = errors.Join(err, group.Wait())
	return w.latencies, err
}

// committed records the event's commit time.
func (w *watched) committed(id int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting[id] = time.Now()
}

// ids returns the ids of the events in the outbox.
func (w *watched) ids() []int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Collect(maps.Keys(w.waiting))
}

// haveLeft records the latencies of the events that have left the outbox.
func (w *watched) haveLeft(ids, still []int64) {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range ids {
		if !slices.Contains(still, id) {
			w.latencies = append(w.latencies, float64(now.Sub(w.waiting[id]).Microseconds())/1e3)
			delete(w.waiting, id)
		}
	}
}

// poll polls for the events until publishing has ended and all have left the
// outbox.
func (w *watched) poll(ctx, publishing context.Context, d *database) error {
	// A prepared query takes little CPU time. The polls and the relay share the CPUs.
	stillThere, err := d.PreparexContext(ctx, "SELECT id FROM outbox_events WHERE id = ANY ($1)") //nolint:sqlclosecheck // closed below
	if err != nil {
		return fmt.Errorf("prepare the poll: %w", err)
	}
	defer stillThere.Close()
	var end time.Time
	for {
		ids := w.ids()
		if publishing.Err() != nil {
			if len(ids) == 0 {
				return nil
			}
			if end.IsZero() {
				end = time.Now().Add(watchPatience)
			}
			if time.Now().After(end) {
				return fmt.Errorf("events are still in the outbox after %s", watchPatience)
			}
		}
		if len(ids) > 0 {
			var still []int64
			if err := stillThere.SelectContext(ctx, &still, pq.Array(ids)); err != nil {
				return fmt.Errorf("poll for the events: %w", err)
			}
			w.haveLeft(ids, still)
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller has ended the run
		case <-time.After(watchInterval):
		}
	}
}

const (
	outageTime    = 3 * time.Second
	outageRate    = 500 // users a second, well below the limit of the API
	outageClients = 8
)

// benchOutage creates users at a steady rate, with a running and with a dead
// ClickHouse, and compares the latencies. The relay runs in both cases.
func benchOutage(ctx context.Context, b *bench) (err error) {
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	api, err := d.startProgram(ctx, "api")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, api.stop()) }()
	relay, err := d.startProgram(ctx, "relay")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, relay.stop()) }()
	alive, dead := b.newSeries("POST /v1/users, p99, ClickHouse alive", "ms"), b.newSeries("POST /v1/users, p99, ClickHouse dead", "ms")
	measure := func(s *series) func(context.Context) error {
		return func(ctx context.Context) error {
			times, err := paced(ctx, api.http, outageClients, outageRate, b.during(outageTime))
			s.add(percentile(times, 0.99))
			return err
		}
	}
	server := b.engines.clickHouse
	err = b.inRounds(ctx, measure(alive),
		func(context.Context) error { return server.Kill() },
		measure(dead),
		func(ctx context.Context) error {
			if err := server.Start(ctx); err != nil {
				return fmt.Errorf("restart ClickHouse: %w", err)
			}
			return d.awaitDrained(ctx)
		})
	if err != nil {
		return err
	}
	alive.show(b.out)
	dead.show(b.out)
	b.compare("api_p99_outage_ratio", dead, alive)
	return nil
}

// paced creates users at a steady rate. It returns the time of each request in
// milliseconds, measured from the scheduled start of the request.
func paced(ctx context.Context, address string, clients, rate int, during time.Duration) ([]float64, error) {
	due := make(chan time.Time, rate)
	var mu sync.Mutex
	var times []float64
	group, ctx := errgroup.WithContext(ctx)
	for range clients {
		group.Go(func() error {
			c, err := newClient(ctx, address)
			if err != nil {
				return err
			}
			defer c.Close()
			for at := range due {
				wait, err := c.createUser(false)
				if err != nil {
					return err
				}
				if wait > 0 {
					return errors.New("the API is overloaded, so the latency has no meaning")
				}
				mu.Lock()
				times = append(times, float64(time.Since(at).Microseconds())/1e3)
				mu.Unlock()
			}
			return nil
		})
	}
	start := time.Now()
	for i := range int(during.Seconds() * float64(rate)) {
		at := start.Add(time.Duration(i) * time.Second / time.Duration(rate))
		time.Sleep(time.Until(at))
		select {
		case due <- at:
		case <-ctx.Done():
		}
	}
	close(due)
	return times, group.Wait() //nolint:wrapcheck // the error names the operation
}
