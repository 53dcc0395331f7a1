package main

import (
	"cmp"
	"context"
	"errors"
	"math"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/admin"
	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/relay"
	"github.com/diehard-outbox/diehard/pkg/relay/page"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

const applicationName = "diehard-relay"

// run delivers events until ctx ends. It starts without a database and reports
// not ready until the databases are available.
func run(ctx context.Context, p cli.Process, c *config.Relay) error {
	limitMemory(c.Relay.BatchMaxBytes)
	connections := c.Postgres.MaxOpenConns
	if connections == 0 {
		// A worker uses two connections: one holds the lease, one reads events. Five more
		// connections serve the cutter, the poll, the loops, readiness and metrics, and two
		// the page.
		connections = 2*c.Relay.Workers + 7
	}
	db, err := postgres.Open(postgres.Options{
		DSN:             c.Postgres.DSN,
		PasswordFile:    c.Postgres.PasswordFile,
		MaxOpenConns:    connections,
		ApplicationName: applicationName,
		Session:         store.Session(c.Relay.FlushTimeout),
		KeepStatements:  true,
		Log:             p.Log,
	})
	if err != nil {
		return err
	}
	defer db.Close()
	sink, err := clickhouse.Open(sinkOptions(c))
	if err != nil {
		return err
	}
	defer sink.Close()

	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewDBStatsCollector(db.DB, "postgres"))
	var listening atomic.Bool
	registerConnections(registry, sink, &listening)
	wake, err := postgres.Listen(ctx, postgres.ListenOptions{
		DSN:             cmp.Or(c.Postgres.ListenDSN, c.Postgres.DSN),
		PasswordFile:    c.Postgres.PasswordFile,
		ApplicationName: applicationName,
		Channels:        []string{outbox.Channel, store.BatchesChannel},
		Log:             p.Log,
		Changed:         listening.Store,
	})
	if err != nil {
		return err
	}
	outboxStore, self := store.New(db, storeOptions(c)), member(p.Version, c)
	delivery := relay.New(relay.Options{
		Store:           outboxStore,
		Sink:            sink,
		Published:       wake[outbox.Channel],
		BatchesCut:      wake[store.BatchesChannel],
		Log:             p.Log,
		Registry:        registry,
		Member:          self,
		Tracer:          p.Tracer,
		SinkAttributes:  sink.Attributes(),
		Workers:         c.Relay.Workers,
		MaxBytes:        c.Relay.BatchMaxBytes,
		Linger:          c.Relay.Linger,
		PollInterval:    c.Relay.PollInterval,
		FlushTimeout:    c.Relay.FlushTimeout,
		ShutdownTimeout: c.Relay.ShutdownTimeout,
		BackoffMin:      c.Relay.BackoffMin,
		BackoffMax:      c.Relay.BackoffMax,

		DeadLetterAttempts: c.Relay.DeadLetterAttempts,
		DeadLetterAfter:    c.Relay.DeadLetterAfter,

		Vacuum:              c.Housekeeping.Vacuum != config.Off,
		DeadLetterRetention: c.Housekeeping.DeadLetterRetention,
		AuditRetention:      c.Housekeeping.AuditRetention,
	})
	started := make(chan struct{})
	isReady := func(ctx context.Context) error {
		select {
		case <-started:
			return delivery.Ready(ctx)
		default:
			return errNotStarted
		}
	}
	ready := []admin.Check{
		{Name: "postgresql", Func: func(ctx context.Context) error { return schema(c).CheckReady(ctx, db.DB) }},
		{Name: "delivery", Func: isReady},
	}
	options := admin.Options{Addr: c.Admin.Addr, Registry: registry, Ready: ready}
	sample := func(context.Context) {}
	if page.Serves(c.Admin.Addr, c.Admin.Token) {
		operators := page.New(page.Options{
			Store: outboxStore, ID: self.ID, Version: p.Version, Ready: isReady, Progress: delivery.Progress,
			Log: p.Log, Addr: c.Admin.Addr, Token: c.Admin.Token, MaxBacklogBytes: c.Outbox.MaxBacklogBytes,
		})
		options.Page, sample = operators, operators.Run
	} else {
		p.Log.InfoContext(ctx, "page off", "hint", "set admin.token to see the relay's page on admin.addr")
	}
	return p.WithAdmin(ctx, options, func(ctx context.Context) error {
		ctx, stop := context.WithCancel(ctx)
		var samples sync.WaitGroup
		samples.Go(func() { sample(ctx) })
		defer samples.Wait()
		defer stop()
		if err := p.AwaitSchema(ctx, db, schema(c), make(chan struct{})); err != nil {
			return err
		}
		close(started)
		return delivery.Run(ctx)
	})
}

// limitMemory sets Go's soft memory limit, unless GOMEMLIMIT is set. It keeps the process
// below three times maxBytes, plus 100 MB. See
// docs/adr/0001-memory-limit-of-the-relay.md.
func limitMemory(maxBytes int64) {
	const overhead = 20 << 20                      // the rest of the heap
	if debug.SetMemoryLimit(-1) == math.MaxInt64 { // GOMEMLIMIT is not set
		debug.SetMemoryLimit(3*maxBytes + overhead)
	}
}

var errNotStarted = errors.New("not started: waiting for postgresql")

func sinkOptions(c *config.Relay) clickhouse.Options {
	return clickhouse.Options{
		DSN:     c.ClickHouse.DSN,
		Table:   c.ClickHouse.Table,
		Cluster: c.ClickHouse.Cluster,
		// Each worker uses one connection for its insert and one to resolve an attempt.
		// The probe of the circuit breaker uses one more connection.
		MaxOpenConns: 2*c.Relay.Workers + 1,
	}
}

func storeOptions(c *config.Relay) store.Options {
	return store.Options{
		MaxRows: c.Relay.BatchMaxRows,
		// A batch has at most half of the process's limit, so that a worker can read one
		// batch while another worker inserts.
		MaxBytes:       c.Relay.BatchMaxBytes / 2,
		FlushTimeout:   c.Relay.FlushTimeout,
		MaxDelay:       c.Relay.BackoffMax,
		MaxDeadLetters: c.Relay.DeadLettersPerHour,
		Schema:         c.Postgres.Schema,
		Lossless:       c.Postgres.History == config.HistoryLossless,
	}
}
