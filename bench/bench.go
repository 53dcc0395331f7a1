package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// bench is a run of the benchmark: its engines and its results. The engines start
// when the first part needs them.
type bench struct {
	options

	out       io.Writer
	measured  []*series
	figures   []figure
	engines   *engines
	databases int

	part  string                 // the current part and its number
	stage atomic.Pointer[string] // the current stage
}

type engines struct {
	postgres   *devstack.Postgres
	clickHouse *devstack.ClickHouse
}

var quietLog = slog.New(slog.DiscardHandler)

func newBench(o options, out io.Writer) *bench {
	b := &bench{options: o, out: out}
	b.at("starting")
	return b
}

// at sets the stage that the run reports every minute.
func (b *bench) at(stage string) {
	stage = b.part + stage
	b.stage.Store(&stage)
}

// close stops the engines.
func (b *bench) close() error {
	if b.engines == nil {
		return nil
	}
	return errors.Join(b.engines.clickHouse.Stop(), b.engines.postgres.Stop())
}

// scaled returns n times the run's scale, or least if that is higher.
func (b *bench) scaled(n, least int) int { return max(least, int(float64(n)*b.scale)) }

// during returns a duration times the run's scale.
func (b *bench) during(d time.Duration) time.Duration {
	return max(200*time.Millisecond, time.Duration(float64(d)*b.scale))
}

// inRounds runs the cases one after the other, once in each round.
func (b *bench) inRounds(ctx context.Context, cases ...func(ctx context.Context) error) error {
	for round := range b.rounds {
		for i, run := range cases {
			b.at(fmt.Sprintf("round %d of %d, case %d of %d", round+1, b.rounds, i+1, len(cases)))
			if err := run(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// PostgreSQL has its default settings, including fsync and synchronous_commit. Only
// its limits of memory and log are raised: the defaults are too small for today's
// machines.
var postgresSettings = map[string]string{
	"shared_buffers":           "512MB",
	"max_wal_size":             "4GB",
	"shared_preload_libraries": "pg_stat_statements",
}

func (b *bench) start(ctx context.Context) (*engines, error) {
	if b.engines != nil {
		return b.engines, nil
	}
	p, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Durable: true, Settings: postgresSettings})
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	c, err := devstack.StartClickHouse(ctx, devstack.ClickHouseOptions{})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start ClickHouse: %w", err), p.Stop())
	}
	b.engines = &engines{postgres: p, clickHouse: c}
	return b.engines, nil
}

// database is a new, migrated PostgreSQL database together with a ClickHouse
// database, for one part.
type database struct {
	*sqlx.DB

	bench      *bench
	name       string
	dsn        string
	clickHouse string // DSN of the native protocol
	sink       *sqlx.DB
}

func (b *bench) database(ctx context.Context) (*database, error) {
	e, err := b.start(ctx)
	if err != nil {
		return nil, err
	}
	b.databases++
	name := fmt.Sprintf("bench_%d", b.databases)
	d := &database{bench: b, name: name, clickHouse: e.clickHouse.NativeDSN(name)}
	if d.dsn, err = e.postgres.CreateDatabase(ctx, name); err != nil {
		return nil, fmt.Errorf("create a database: %w", err)
	}
	if d.DB, err = postgres.Open(postgres.Options{DSN: d.dsn, MaxOpenConns: 50}); err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	schema := postgres.Schema{Sets: []postgres.Set{postgres.Outbox, postgres.Users}}
	if err := schema.Migrate(ctx, d.DB.DB, quietLog); err != nil {
		return nil, fmt.Errorf("migrate PostgreSQL: %w", err)
	}
	if err := e.clickHouse.CreateDatabase(ctx, name); err != nil {
		return nil, fmt.Errorf("create a ClickHouse database: %w", err)
	}
	if err := clickhouse.Migrate(ctx, clickhouse.Options{DSN: d.clickHouse}, quietLog); err != nil {
		return nil, fmt.Errorf("migrate ClickHouse: %w", err)
	}
	if d.sink, err = sqlx.Open("clickhouse", d.clickHouse); err != nil {
		return nil, fmt.Errorf("open ClickHouse: %w", err)
	}
	// Merges would use CPU time at random moments and hide duplicates.
	if _, err := d.sink.ExecContext(ctx, "SYSTEM STOP MERGES event_log"); err != nil {
		return nil, fmt.Errorf("stop merges: %w", err)
	}
	return d, nil
}

// drop closes the database and frees its disk space.
func (d *database) drop(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	_ = d.Close()
	_ = d.sink.Close()
	server, err := sqlx.Open("postgres", d.bench.engines.postgres.DSN("postgres"))
	if err != nil {
		return fmt.Errorf("drop the database: %w", err)
	}
	defer server.Close()
	if _, err := server.ExecContext(ctx, "DROP DATABASE "+d.name+" WITH (FORCE)"); err != nil {
		return fmt.Errorf("drop the database: %w", err)
	}
	sink, err := sqlx.Open("clickhouse", d.bench.engines.clickHouse.NativeDSN("default"))
	if err != nil {
		return fmt.Errorf("drop the ClickHouse database: %w", err)
	}
	defer sink.Close()
	if _, err := sink.ExecContext(ctx, "DROP DATABASE "+d.name); err != nil {
		return fmt.Errorf("drop the ClickHouse database: %w", err)
	}
	return nil
}

// eventContext is the expression of an event's context: about 170 bytes of
// JSON, different for each event.
const eventContext = `json_build_object('user_id', gen_random_uuid(), 'email', 'user-' || n || '@example.com',
	'first_name', 'Ada', 'last_name', 'Lovelace', 'note', left(md5(n::text), 20))`

// events describes events that an INSERT publishes.
type events struct {
	n       int
	context string // SQL expression for event number n
	args    []any
	// traceparent is an SQL expression for event number n. It may be empty.
	traceparent string
}

// typical returns n events of typical size.
func typical(n int) events { return events{n: n, context: eventContext} }

// publish inserts the events in a transaction and returns a function that
// commits it.
func (d *database) publish(ctx context.Context, e events) (commit func() error, err error) {
	tx, err := d.BeginTxx(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("publish %d events: %w", e.n, err)
	}
	_, err = tx.ExecContext(ctx, fmt.Sprintf(`INSERT INTO outbox_events (event_type, event_context, traceparent)
		SELECT 'user_created', %s, %s FROM generate_series(1, %d) AS n`, e.context, cmp.Or(e.traceparent, "NULL"), e.n), e.args...)
	if err == nil {
		_, err = d.ExecContext(ctx, "CHECKPOINT") // otherwise a checkpoint runs at a random moment later
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("publish %d events: %w", e.n, err), tx.Rollback())
	}
	return tx.Commit, nil
}

// publishNow publishes n typical events.
func (d *database) publishNow(ctx context.Context, n int) error {
	commit, err := d.publish(ctx, typical(n))
	if err != nil {
		return err
	}
	return commit()
}

// empty truncates every table that a run fills. Ids start again, and the next relay finds a
// new outbox. Otherwise it would suspect that another outbox has filled the tables, because
// the first ids are missing, and resolve every event.
func (d *database) empty(ctx context.Context) error {
	for {
		_, err := d.ExecContext(ctx, "TRUNCATE users, idempotency_keys, outbox_events, outbox_batches, outbox_cursor, outbox_history, outbox_dead_letters RESTART IDENTITY")
		if err == nil {
			break
		}
		// The TRUNCATE can deadlock with a polling relay, and PostgreSQL then
		// ends one of the two.
		if server, ok := errors.AsType[*pq.Error](err); !ok || server.Code != pqerror.TRDeadlockDetected {
			return fmt.Errorf("empty the tables: %w", err)
		}
	}
	if _, err := d.sink.ExecContext(ctx, "TRUNCATE TABLE event_log"); err != nil {
		return fmt.Errorf("empty the table in ClickHouse: %w", err)
	}
	return nil
}

// emptied returns a case that empties the tables before it runs.
func (d *database) emptied(run func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if err := d.empty(ctx); err != nil {
			return err
		}
		return run(ctx)
	}
}

// pollInterval is short compared with the measured times, and long compared
// with the 0.5 ms of CPU time that a poll takes.
const pollInterval = 25 * time.Millisecond

// awaitDrained waits until all events published so far are settled.
func (d *database) awaitDrained(ctx context.Context) error {
	var last int64
	if err := d.GetContext(ctx, &last, "SELECT coalesce(max(id), 0) FROM outbox_events"); err != nil {
		return fmt.Errorf("find the last event: %w", err)
	}
	for {
		var drained bool
		err := d.GetContext(ctx, &drained, `SELECT max(high_watermark) >= $1 AND NOT EXISTS (SELECT FROM outbox_batches)
			FROM outbox_cursor`, last)
		if err != nil {
			return fmt.Errorf("wait for the outbox to drain: %w", err)
		}
		if drained {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller has ended the run
		case <-time.After(pollInterval):
		}
	}
}

// expectOnce returns an error unless ClickHouse has n events, each once.
// Without this check the figures would be meaningless.
func (d *database) expectOnce(ctx context.Context, n int) error {
	var rows, distinct uint64
	if err := d.sink.QueryRowContext(ctx, "SELECT count(), uniqExact(event_id) FROM event_log").Scan(&rows, &distinct); err != nil {
		return fmt.Errorf("count the rows in ClickHouse: %w", err)
	}
	if rows != uint64(n) || distinct != uint64(n) { //nolint:gosec // never negative
		return fmt.Errorf("published %d events, but ClickHouse has %d rows (%d distinct)", n, rows, distinct)
	}
	return nil
}

// wake notifies the relays that events are waiting, as the API does.
func (d *database) wake(ctx context.Context) error {
	if _, err := d.ExecContext(ctx, "SELECT pg_notify($1, '')", outbox.Channel); err != nil {
		return fmt.Errorf("wake the relays: %w", err)
	}
	return nil
}

// machine describes the environment of the figures.
type machine struct {
	CPU        string `json:"cpu"`
	Cores      int    `json:"cores"`
	OS         string `json:"os"`
	Go         string `json:"go"`
	Postgres   string `json:"postgres"`
	ClickHouse string `json:"clickhouse"`
}

func (b *bench) results(ctx context.Context) (results, error) {
	r := results{
		At: time.Now().UTC().Truncate(time.Second), Rounds: b.rounds, Scale: b.scale, Figures: b.figures,
		Machine: machine{CPU: cpuModel(), Cores: runtime.NumCPU(), OS: runtime.GOOS + "/" + runtime.GOARCH, Go: runtime.Version()},
	}
	for _, s := range b.measured {
		r.Measured = append(r.Measured, s.summary())
	}
	e, err := b.start(ctx)
	if err != nil {
		return r, err
	}
	for _, server := range []struct {
		driver, dsn, query string
		version            *string
	}{
		{"postgres", e.postgres.DSN("postgres"), "SHOW server_version", &r.Machine.Postgres},
		{"clickhouse", e.clickHouse.NativeDSN("default"), "SELECT version()", &r.Machine.ClickHouse},
	} {
		db, err := sqlx.Open(server.driver, server.dsn)
		if err != nil {
			return r, fmt.Errorf("read a version: %w", err)
		}
		err = db.GetContext(ctx, server.version, server.query)
		_ = db.Close()
		if err != nil {
			return r, fmt.Errorf("read a version: %w", err)
		}
	}
	return r, nil
}

func cpuModel() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}
