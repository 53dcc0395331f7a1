package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	chgo "github.com/ClickHouse/clickhouse-go/v2"
	"github.com/google/uuid"
)

const (
	million       = 1_000_000
	blockRows     = 50_000 // the default size of a batch
	microsPerUnit = 1e6
)

// benchRelay drains a million events with one relay and its default
// configuration. The reference is the bare pipe: it moves the same rows in the
// fastest way that the databases offer, one step after the other.
func benchRelay(ctx context.Context, b *bench) (err error) {
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	n := b.scaled(million, blockRows)
	relayed, piped := b.newSeries("one relay", "events/s"), b.newSeries("the bare pipe", "events/s")
	steps := []*series{
		b.newSeries("  COPY TO, binary, discarded", "s"), b.newSeries("  insert into ClickHouse, blocks of 50,000", "s"),
		b.newSeries("  DELETE by ranges of 50,000", "s"),
	}
	cpu := []*series{
		b.newSeries("CPU of the relay", "us/event"), b.newSeries("CPU of PostgreSQL", "us/event"),
		b.newSeries("CPU of ClickHouse", "us/event"),
	}
	memory := b.newSeries("the relay's peak RSS", "MB")
	err = b.inRounds(ctx, func(ctx context.Context) error {
		took, err := d.pipe(ctx, n)
		if err != nil {
			return err
		}
		var whole time.Duration
		for i := range took {
			steps[i].add(took[i].Seconds())
			whole += took[i]
		}
		piped.add(float64(n) / whole.Seconds())
		return d.expectOnce(ctx, n)
	}, func(ctx context.Context) error {
		drained, err := d.drain(ctx, typical(n))
		if err != nil {
			return err
		}
		relayed.add(float64(n) / drained.took.Seconds())
		for i := range cpu {
			cpu[i].add(drained.cpu[i].Seconds() * microsPerUnit / float64(n))
		}
		memory.add(drained.peakRSS)
		return nil
	})
	if err != nil {
		return err
	}
	for _, s := range append(append([]*series{relayed, piped}, steps...), append(cpu, memory)...) {
		s.show(b.out)
	}
	b.figure("relay_events_per_s", relayed.median())
	b.compare("relay_vs_pipe", relayed, piped)
	b.figure("relay_cpu_us", cpu[0].median())
	b.figure("postgres_cpu_us", cpu[1].median())
	b.figure("clickhouse_cpu_us", cpu[2].median())
	b.figure("relay_peak_rss_mb", memory.median())
	return nil
}

// drained holds the cost of draining the outbox.
type drained struct {
	took    time.Duration
	cpu     [3]time.Duration // of the relays, PostgreSQL and ClickHouse
	peakRSS float64          // of the first relay
	batches float64
}

// drain drains the events with one relay that has these variables. It returns an error
// unless each event arrives once.
func (d *database) drain(ctx context.Context, e events, env ...string) (result drained, err error) {
	if err := d.empty(ctx); err != nil {
		return result, err
	}
	f, err := d.startFleet(ctx, 1, env...)
	if err != nil {
		return result, err
	}
	defer func() { err = errors.Join(err, f.stop()) }()
	if result, err = f.drain(ctx, e); err != nil {
		return result, err
	}
	return result, d.expectOnce(ctx, e.n)
}

// fleet holds the relays of one database.
type fleet struct {
	database *database
	relays   []*program
}

func (d *database) startFleet(ctx context.Context, relays int, env ...string) (*fleet, error) {
	f := &fleet{database: d}
	for range relays {
		p, err := d.startProgram(ctx, "relay", env...)
		if err != nil {
			return nil, errors.Join(err, f.stop())
		}
		f.relays = append(f.relays, p)
	}
	return f, nil
}

func (f *fleet) stop() (err error) {
	for _, p := range f.relays {
		err = errors.Join(err, p.stop())
	}
	return err
}

// drain drains the events with the fleet. The relays are ready and idle when
// the events are committed. The clock runs from the commit until the last event
// is settled.
func (f *fleet) drain(ctx context.Context, e events) (result drained, err error) {
	d := f.database
	first := f.relays[0].cmd.Process.Pid
	pids := []int{first, d.bench.engines.postgres.PID(), d.bench.engines.clickHouse.PID()}
	commit, err := d.publish(ctx, e)
	if err != nil {
		return result, err
	}
	batches, err := f.batches()
	if err != nil {
		return result, err
	}
	before, err := cpuTimes(pids)
	if err != nil {
		return result, err
	}
	start := time.Now()
	if err := commit(); err != nil {
		return result, err
	}
	if err := d.wake(ctx); err != nil {
		return result, err
	}
	if err := d.awaitDrained(ctx); err != nil {
		return result, err
	}
	result.took = time.Since(start)
	after, err := cpuTimes(pids)
	if err != nil {
		return result, err
	}
	for i := range result.cpu {
		result.cpu[i] = after[i] - before[i]
	}
	if result.batches, err = f.batches(); err != nil {
		return result, err
	}
	result.batches -= batches
	result.peakRSS, err = peakRSS(first)
	return result, err
}

// batches returns the number of batches that the fleet has inserted since its
// start. The metric counts a batch before it is settled.
func (f *fleet) batches() (n float64, err error) {
	for _, p := range f.relays {
		inserts, err := p.metric("diehard_relay_batch_rows_count")
		if err != nil {
			return 0, err
		}
		n += inserts
	}
	return n, nil
}

func cpuTimes(pids []int) (times [3]time.Duration, err error) {
	for i, pid := range pids {
		if times[i], err = cpuTime(pid); err != nil {
			return times, err
		}
	}
	return times, nil
}

// pipe moves the events of the outbox in three steps and returns the time of each
// step.
func (d *database) pipe(ctx context.Context, n int) (took [3]time.Duration, err error) {
	if err := d.empty(ctx); err != nil {
		return took, err
	}
	// The blocks are read from other events with the same contents, so that the
	// measured events have not been read before.
	if err := d.publishNow(ctx, n); err != nil {
		return took, err
	}
	rows, err := d.readBlocks(ctx)
	if err != nil {
		return took, err
	}
	if err := d.empty(ctx); err != nil {
		return took, err
	}
	if err := d.publishNow(ctx, n); err != nil {
		return took, err
	}
	var first int64
	if err := d.GetContext(ctx, &first, "SELECT min(id) FROM outbox_events"); err != nil {
		return took, fmt.Errorf("find the first event: %w", err)
	}
	for i, step := range []func(context.Context) error{
		func(ctx context.Context) error {
			// The rows go through a pipe to a program that discards them, so
			// that they leave the server.
			_, err := d.ExecContext(ctx, `COPY (SELECT id, event_id, event_type, event_date_time, environment, event_context,
				metadata_version, traceparent, published_at FROM outbox_events ORDER BY id)
				TO PROGRAM 'cat > /dev/null' (FORMAT binary)`)
			return err //nolint:wrapcheck // the driver's own error
		},
		func(ctx context.Context) error { return d.insertBlocks(ctx, rows) },
		func(ctx context.Context) error {
			for id := first; id < first+int64(n); id += blockRows {
				if _, err := d.ExecContext(ctx, "DELETE FROM outbox_events WHERE id >= $1 AND id < $2", id, id+blockRows); err != nil {
					return err //nolint:wrapcheck // the driver's own error
				}
			}
			return nil
		},
	} {
		start := time.Now()
		if err := step(ctx); err != nil {
			return took, fmt.Errorf("the bare pipe: %w", err)
		}
		took[i] = time.Since(start)
	}
	return took, nil
}

// block holds the rows of a batch by column, ready for the insert.
type block struct {
	eventID     []uuid.UUID
	eventType   []string
	happened    []time.Time
	environment []string
	context     []string
	version     []uint64
}

func (d *database) readBlocks(ctx context.Context) (blocks []*block, err error) {
	rows, err := d.QueryContext(ctx, `SELECT event_id, event_type, event_date_time, environment, event_context, metadata_version
		FROM outbox_events ORDER BY id`)
	if err != nil {
		return nil, fmt.Errorf("read the events: %w", err)
	}
	defer rows.Close()
	var current *block
	for rows.Next() {
		var (
			version                         int64
			eventID                         uuid.UUID
			eventType, environment, content string
			happened                        time.Time
		)
		if err := rows.Scan(&eventID, &eventType, &happened, &environment, &content, &version); err != nil {
			return nil, fmt.Errorf("read the events: %w", err)
		}
		if current == nil || len(current.eventID) == blockRows {
			current = &block{}
			blocks = append(blocks, current)
		}
		current.eventID = append(current.eventID, eventID)
		current.eventType = append(current.eventType, eventType)
		current.happened = append(current.happened, happened)
		current.environment = append(current.environment, environment)
		current.context = append(current.context, content)
		current.version = append(current.version, uint64(version)) //nolint:gosec // never negative
	}
	return blocks, rows.Err() //nolint:wrapcheck // the driver's own error
}

func (d *database) insertBlocks(ctx context.Context, blocks []*block) error {
	options, err := chgo.ParseDSN(d.clickHouse)
	if err != nil {
		return fmt.Errorf("insert the blocks: %w", err)
	}
	conn, err := chgo.Open(options)
	if err != nil {
		return fmt.Errorf("insert the blocks: %w", err)
	}
	defer conn.Close()
	for _, block := range blocks {
		if err := insertBlock(ctx, conn, block); err != nil {
			return fmt.Errorf("insert the blocks: %w", err)
		}
	}
	return nil
}

func insertBlock(ctx context.Context, conn chgo.Conn, rows *block) error {
	// The relay changes this setting too. It makes the pipe as fast as possible.
	ctx = chgo.Context(ctx, chgo.WithSettings(chgo.Settings{"optimize_on_insert": 0}))
	batch, err := conn.PrepareBatch(ctx, `INSERT INTO event_log
		(event_id, event_type, event_date_time, environment, event_context, metadata_version)`)
	if err != nil {
		return err //nolint:wrapcheck // the caller wraps it
	}
	defer batch.Close()
	for i, column := range []any{rows.eventID, rows.eventType, rows.happened, rows.environment, rows.context, rows.version} {
		if err := batch.Column(i).Append(column); err != nil {
			return err //nolint:wrapcheck // the caller wraps it
		}
	}
	return batch.Send() //nolint:wrapcheck // the caller wraps it
}
