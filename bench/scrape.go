package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"
)

const (
	scrapeEvents = 5 * million
	scrapeTime   = 20 * time.Second
	// countTime is enough for a relay to count the events once.
	countTime = 40 * time.Second
)

// benchScrape measures the cost of a scrape each second while many events wait, because
// ClickHouse is dead. The scrapes must not read the whole table.
func benchScrape(ctx context.Context, b *bench) (err error) {
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	relay, err := d.startProgram(ctx, "relay")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, relay.stop()) }()
	server := b.engines.clickHouse
	if err := server.Kill(); err != nil {
		return fmt.Errorf("kill ClickHouse: %w", err)
	}
	defer func() { err = errors.Join(err, server.Start(context.WithoutCancel(ctx))) }()
	n := b.scaled(scrapeEvents, 100_000)
	if err := d.publishNow(ctx, n); err != nil {
		return err
	}
	if _, err := d.ExecContext(ctx, "VACUUM (ANALYZE) outbox_events"); err != nil { // otherwise autovacuum runs at a random moment later
		return fmt.Errorf("vacuum: %w", err)
	}
	names := [2]string{"the relay", "PostgreSQL"}
	pids := []int{relay.cmd.Process.Pid, b.engines.postgres.PID()}
	var without, with [2]*series
	for i, name := range names {
		without[i] = b.newSeries("CPU of "+name+", 5 million events wait", "%")
		with[i] = b.newSeries("CPU of "+name+", a scrape a second", "%")
	}
	// measure returns a case that adds the CPU time of the two programs while do runs.
	measure := func(of [2]*series, do func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			before, err := cpuTimes(pids)
			if err != nil {
				return err
			}
			start := time.Now()
			if err := do(ctx); err != nil {
				return err
			}
			took := time.Since(start)
			after, err := cpuTimes(pids)
			if err != nil {
				return err
			}
			for i := range names {
				of[i].add(100 * (after[i] - before[i]).Seconds() / took.Seconds())
			}
			return nil
		}
	}
	scans, err := d.sequentialScans(ctx)
	if err != nil {
		return err
	}
	// A relay counts a large backlog for another minute after a scrape, so the two cases do
	// not alternate.
	for _, step := range []func(context.Context) error{
		func(ctx context.Context) error { return pause(ctx, b.during(scrapeTime)) }, // the relay notices that ClickHouse is dead
		func(ctx context.Context) error {
			return b.inRounds(ctx, measure(without, func(ctx context.Context) error { return pause(ctx, b.during(scrapeTime)) }))
		},
		func(ctx context.Context) error { return relay.scrape(ctx, b.during(countTime), n) },
		func(ctx context.Context) error {
			return b.inRounds(ctx, measure(with, func(ctx context.Context) error { return relay.scrape(ctx, b.during(scrapeTime), n) }))
		},
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	more, err := d.sequentialScans(ctx)
	if err != nil {
		return err
	}
	if more != scans {
		return fmt.Errorf("%d sequential scans of outbox_events", more-scans)
	}
	cost := 0.0
	for i := range names {
		without[i].show(b.out)
		with[i].show(b.out)
		cost += with[i].median() - without[i].median()
	}
	b.figure("scrape_cpu_percent", cost)
	return nil
}

// scrape scrapes the program once a second for the time d. It returns an error if the
// backlog at the end is not the number of events.
func (p *program) scrape(ctx context.Context, d time.Duration, events int) error {
	scrapes := time.NewTicker(time.Second)
	defer scrapes.Stop()
	for end := time.Now().Add(d); ; {
		backlog, err := p.metric("diehard_outbox_backlog_events")
		if err != nil {
			return err
		}
		if time.Now().After(end) {
			if math.Abs(backlog-float64(events)) > float64(events)/20 {
				return fmt.Errorf("the relay shows a backlog of %.0f events instead of %d", backlog, events)
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller has ended the run
		case <-scrapes.C:
		}
	}
}

// sequentialScans returns the number of sequential scans of outbox_events.
func (d *database) sequentialScans(ctx context.Context) (scans int, err error) {
	if err := d.GetContext(ctx, &scans, "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'outbox_events'"); err != nil {
		return 0, fmt.Errorf("count sequential scans: %w", err)
	}
	return scans, nil
}
