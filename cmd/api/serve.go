package main

import (
	"context"
	"log/slog"
	"math"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/admin"
	"github.com/diehard-outbox/diehard/pkg/backlog"
	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/httpapi"
	"github.com/diehard-outbox/diehard/pkg/httpapi/admission"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/users"
)

// serve serves the API until ctx ends. It starts without a database and reports
// not ready until PostgreSQL is available.
func serve(ctx context.Context, p cli.Process, c *config.API) error {
	if err := c.CheckAccess(); err != nil {
		return err
	}
	db, err := open(p, c, c.Postgres.MaxOpenConns)
	if err != nil {
		return err
	}
	defer db.Close()
	// The readiness check has its own connection, because requests may hold all others.
	probe, err := open(p, c, 1)
	if err != nil {
		return err
	}
	defer probe.Close()
	tuneGC(c.HTTP.BodyBudget)

	if c.API.Auth == config.Off {
		p.Log.WarnContext(ctx, "authentication disabled", "api_auth", c.API.Auth)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewDBStatsCollector(db.DB, "postgres"))
	notifier := outbox.NewNotifier(db.DB, p.Log)
	publisher := outbox.NewPublisher(outbox.PublisherOptions{
		Environment: c.Environment, MaxEventBytes: int(c.Outbox.MaxEventBytes), Schema: c.Postgres.Schema,
	})
	keeper := idempotency.NewKeeper(idempotency.Options{DB: db, Log: p.Log, TTL: c.HTTP.IdempotencyTTL, Schema: c.Postgres.Schema})
	full, watch := watchBacklog(c, p.Log, db, registry)
	server := httpapi.New(httpapi.Options{
		Addr:        c.HTTP.Addr,
		DB:          db,
		Ping:        probe.PingContext,
		Users:       users.NewService(users.Options{DB: db, Publisher: publisher, Schema: c.Postgres.Schema}),
		Publisher:   publisher,
		Idempotency: keeper,
		Hint:        notifier.Hint,
		Keys:        keysOf(c),
		AuthOff:     c.API.Auth == config.Off,
		Full:        full,

		FullRefusesChanges: c.Outbox.FullRefuses == config.RefuseChanges,

		RatePerKey:        c.HTTP.RatePerKey,
		RatePerAddress:    c.HTTP.RatePerAddress,
		TrustedProxies:    c.HTTP.TrustedProxies,
		MaxConcurrent:     c.HTTP.MaxConcurrent,
		Log:               p.Log,
		Registerer:        registry,
		Tracer:            p.Tracer,
		MaxBodyBytes:      c.HTTP.MaxBodyBytes,
		BodyBudget:        c.HTTP.BodyBudget,
		DocsOff:           c.HTTP.Docs == config.Off,
		AddressesOff:      c.HTTP.LogAddresses == config.Off,
		ReadHeaderTimeout: c.HTTP.ReadHeaderTimeout,
		ReadTimeout:       c.HTTP.ReadTimeout,
		RequestTimeout:    c.HTTP.RequestTimeout,
		WriteTimeout:      c.HTTP.WriteTimeout,
		IdleTimeout:       c.HTTP.IdleTimeout,
		ShutdownTimeout:   c.HTTP.ShutdownTimeout,
	})
	ready := []admin.Check{
		{Name: "postgresql", Func: func(ctx context.Context) error { return schema(c).CheckReady(ctx, probe.DB) }},
	}
	signaled := ctx
	return p.WithAdmin(ctx, admin.Options{Addr: c.Admin.Addr, Registry: registry, Ready: ready},
		func(ctx context.Context) error {
			asked := make(chan struct{})
			// The notifier outlives ctx because the last requests publish events.
			notifying, stopNotifier := context.WithCancel(context.WithoutCancel(ctx))
			defer stopNotifier()

			group, ctx := errgroup.WithContext(ctx)
			group.Go(func() error { return p.AwaitSchema(ctx, db, schema(c), asked) })
			group.Go(func() error { return notifier.Run(notifying) })
			group.Go(func() error {
				defer stopNotifier()
				// The server does not start if the schema is too old. If PostgreSQL is
				// unavailable, it starts and responds with 503.
				select {
				case <-asked:
					serving, stop := drained(ctx, signaled, c.HTTP.DrainDelay)
					defer stop()
					return server.Run(serving)
				case <-ctx.Done():
					return nil
				}
			})
			group.Go(func() error {
				select {
				case <-asked:
				case <-ctx.Done():
				}
				return keeper.Run(ctx)
			})
			group.Go(func() error {
				select {
				case <-asked:
				case <-ctx.Done():
				}
				return watch(ctx)
			})
			return group.Wait()
		})
}

// watchBacklog returns whether the outbox is full, and a function that watches it until its
// context ends. Without a limit, the outbox is never full.
func watchBacklog(c *config.API, log *slog.Logger, db *sqlx.DB, registry prometheus.Registerer) (full func() bool, watch func(context.Context) error) {
	if c.Outbox.MaxBacklogBytes == 0 {
		return nil, func(context.Context) error { return nil }
	}
	w := backlog.New(backlog.Options{
		DB: db, Schema: c.Postgres.Schema, Limit: c.Outbox.MaxBacklogBytes, Log: log, Registerer: registry,
	})
	return w.Full, w.Run
}

// drained returns a context that ends delay after a signal, so that load balancers can
// notice that the process is not ready. Without a signal, it ends with ctx. After Ctrl-C,
// it ends with ctx, too.
func drained(ctx, signaled context.Context, delay time.Duration) (context.Context, context.CancelFunc) {
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	context.AfterFunc(ctx, func() {
		if cause := context.Cause(signaled); cause != nil && !strings.HasPrefix(cause.Error(), os.Interrupt.String()) {
			select {
			case <-time.After(delay):
			case <-serving.Done():
			}
		}
		stop()
	})
	return serving, stop
}

const (
	// gcPercent lets the heap grow by at least 16 MB between collections. Go's
	// default of 100 allows 4 MB, which an API under load fills 20 times a second.
	gcPercent = 400
	// baseMemory is the memory that the process needs without bodies. bodyFactor is the
	// memory for each byte of a body: the body itself, its values, its statement and
	// garbage. docs/configuration.md has the formula, with as much again for the runtime.
	baseMemory = 64 << 20
	bodyFactor = 8
)

// tuneGC sets the garbage collector's target, and a soft memory limit above which it runs
// more often. GOGC and GOMEMLIMIT override them.
func tuneGC(bodyBudget int64) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if debug.SetMemoryLimit(-1) == math.MaxInt64 { // GOMEMLIMIT is not set
		debug.SetMemoryLimit(baseMemory + bodyFactor*bodyBudget)
	}
}

func keysOf(c *config.API) []admission.Key {
	keys := make([]admission.Key, len(c.API.Keys))
	for i, key := range c.API.Keys {
		keys[i] = admission.Key(key)
	}
	return keys
}

func open(p cli.Process, c *config.API, maxOpenConns int) (*sqlx.DB, error) {
	// PostgreSQL ends the statements and transactions of a dead process soon
	// after the request's deadline.
	limit := strconv.FormatInt((c.HTTP.RequestTimeout + 5*time.Second).Milliseconds(), 10)
	return postgres.Open(postgres.Options{
		DSN:             c.Postgres.DSN,
		PasswordFile:    c.Postgres.PasswordFile,
		MaxOpenConns:    maxOpenConns,
		ApplicationName: "diehard-api",
		// These settings override ALTER DATABASE and ALTER ROLE. A response with the
		// status 2xx means that the change is durable. A statement that is its own
		// transaction uses the default isolation level. If row level security hides
		// rows, a statement fails.
		Session: map[string]string{
			"default_transaction_isolation":       "read committed",
			"idle_in_transaction_session_timeout": limit,
			"idle_session_timeout":                "0",
			"lock_timeout":                        strconv.FormatInt(httpapi.LockTimeout.Milliseconds(), 10),
			"row_security":                        "off",
			"statement_timeout":                   limit,
			"synchronous_commit":                  "on",
			"transaction_timeout":                 limit,
		},
		Log: p.Log,
	})
}
