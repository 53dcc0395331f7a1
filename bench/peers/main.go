// Command peers drains events with other Go libraries that use a PostgreSQL table, for
// comparison in bench. The consumers discard the events. The libraries are dependencies
// of the benchmarks' module, not of Diehard.
//
//	peers river|watermill DSN EVENTS
//
// It prints the seconds that draining took.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	watermillsql "github.com/ThreeDotsLabs/watermill-sql/v4/pkg/sql"
	"github.com/jackc/pgx/v5/pgxpool"
	_ "github.com/lib/pq" // the driver "postgres"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	took, err := run(ctx, os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1) //nolint:gocritic // the process ends
	}
	fmt.Println(took.Seconds()) //nolint:forbidigo // the benchmark reads it
}

func run(ctx context.Context, args []string) (time.Duration, error) {
	const arguments = 3
	if len(args) != arguments {
		return 0, errors.New("usage: peers river|watermill DSN EVENTS")
	}
	n, err := strconv.Atoi(args[2])
	if err != nil {
		return 0, fmt.Errorf("parse the number of events: %w", err)
	}
	switch args[0] {
	case "river":
		return drainRiver(ctx, args[1], n)
	case "watermill":
		return drainWatermill(ctx, args[1], n)
	default:
		return 0, fmt.Errorf("unknown library %q", args[0])
	}
}

// event is about 170 bytes of JSON.
type event struct {
	UserID    string `json:"user_id"`
	Email     string `json:"email"`
	FirstName string `json:"first_name"`
	LastName  string `json:"last_name"`
	Note      string `json:"note"`
}

// Kind implements river.JobArgs.
func (event) Kind() string { return "user_created" }

func newEvent(n int) event {
	return event{
		UserID: "0190c2f0-7f3a-7cc1-b0a8-2b7a3f2f6c11", Email: "user-" + strconv.Itoa(n) + "@example.com",
		FirstName: "Ada", LastName: "Lovelace", Note: "c4ca4238a0b923820dcc509a6f75849bc81e728d9d4c2f636f067f89cc14862c",
	}
}

// countdown reports when n events have been consumed.
type countdown struct {
	left atomic.Int64
	done chan struct{}
}

func newCountdown(n int) *countdown {
	c := &countdown{done: make(chan struct{})}
	c.left.Store(int64(n))
	return c
}

func (c *countdown) count() {
	if c.left.Add(-1) == 0 {
		close(c.done)
	}
}

func (c *countdown) wait(ctx context.Context) error {
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return ctx.Err() //nolint:wrapcheck // the caller's own error
	}
}

type worker struct {
	river.WorkerDefaults[event]

	countdown *countdown
}

// Work implements river.Worker.
func (w *worker) Work(context.Context, *river.Job[event]) error {
	w.countdown.count()
	return nil
}

// checkpoint runs before each drain, as it does before a drain by the relay.
// Otherwise a checkpoint would run at a random moment during the drain. After a
// checkpoint PostgreSQL writes each changed page to the log in full.
const checkpoint = "CHECKPOINT"

// drainRiver runs one job per event. A thousand workers and the shortest allowed
// pause make it much faster than the default settings.
func drainRiver(ctx context.Context, dsn string, n int) (time.Duration, error) {
	pool, err := pgxpool.New(ctx, dsn)
	if err != nil {
		return 0, fmt.Errorf("connect: %w", err)
	}
	defer pool.Close()
	migrator, err := rivermigrate.New(riverpgxv5.New(pool), nil)
	if err != nil {
		return 0, fmt.Errorf("migrate: %w", err)
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return 0, fmt.Errorf("migrate: %w", err)
	}
	countdown := newCountdown(n)
	workers := river.NewWorkers()
	river.AddWorker(workers, &worker{countdown: countdown})
	client, err := river.NewClient(riverpgxv5.New(pool), &river.Config{
		Queues:        map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: 1000}},
		Workers:       workers,
		FetchCooldown: time.Millisecond,
	})
	if err != nil {
		return 0, fmt.Errorf("create a client: %w", err)
	}
	const atOnce = 10_000
	for i := 0; i < n; i += atOnce {
		jobs := make([]river.InsertManyParams, min(atOnce, n-i))
		for j := range jobs {
			jobs[j].Args = newEvent(i + j)
		}
		if _, err := client.InsertManyFast(ctx, jobs); err != nil {
			return 0, fmt.Errorf("insert: %w", err)
		}
	}
	if _, err := pool.Exec(ctx, checkpoint); err != nil {
		return 0, fmt.Errorf("checkpoint: %w", err)
	}
	start := time.Now()
	if err := client.Start(ctx); err != nil {
		return 0, fmt.Errorf("start: %w", err)
	}
	if err := countdown.wait(ctx); err != nil {
		return 0, err
	}
	took := time.Since(start)
	if err := client.Stop(ctx); err != nil {
		return 0, fmt.Errorf("stop: %w", err)
	}
	return took, nil
}

// drainWatermill consumes one message per event, in batches of a thousand. It
// acknowledges the messages and deletes them.
func drainWatermill(ctx context.Context, dsn string, n int) (time.Duration, error) {
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		return 0, fmt.Errorf("connect: %w", err)
	}
	defer db.Close()
	schema := watermillsql.PostgreSQLQueueSchema{SubscribeBatchSize: 1000}
	subscriber, err := watermillsql.NewSubscriber(watermillsql.BeginnerFromStdSQL(db), watermillsql.SubscriberConfig{
		SchemaAdapter:    schema,
		OffsetsAdapter:   watermillsql.PostgreSQLQueueOffsetsAdapter{DeleteOnAck: true},
		InitializeSchema: true,
		PollInterval:     time.Millisecond,
	}, watermill.NopLogger{})
	if err != nil {
		return 0, fmt.Errorf("create a subscriber: %w", err)
	}
	defer subscriber.Close()
	const topic = "events"
	if err := subscriber.SubscribeInitialize(topic); err != nil {
		return 0, fmt.Errorf("create the table: %w", err)
	}
	_, err = db.ExecContext(ctx, `INSERT INTO watermill_events (uuid, payload, metadata)
		SELECT gen_random_uuid(), json_build_object('user_id', gen_random_uuid(), 'email', 'user-' || n || '@example.com',
			'first_name', 'Ada', 'last_name', 'Lovelace', 'note', md5(n::text) || md5((n + 1)::text)), '{}'
		FROM generate_series(1, $1) AS n`, n)
	if err != nil {
		return 0, fmt.Errorf("insert: %w", err)
	}
	if _, err := db.ExecContext(ctx, checkpoint); err != nil {
		return 0, fmt.Errorf("checkpoint: %w", err)
	}
	start := time.Now()
	messages, err := subscriber.Subscribe(ctx, topic)
	if err != nil {
		return 0, fmt.Errorf("subscribe: %w", err)
	}
	for range n {
		select {
		case message := <-messages:
			message.Ack()
		case <-ctx.Done():
			return 0, ctx.Err() //nolint:wrapcheck // the caller's own error
		}
	}
	return time.Since(start), nil
}
