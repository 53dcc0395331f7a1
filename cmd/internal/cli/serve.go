package cli

import (
	"context"
	"errors"
	"time"

	"github.com/jmoiron/sqlx"
	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/pkg/admin"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var errStopping = errors.New("stopping")

// WithAdmin runs work and serves the admin port until work returns. The admin port
// reports not ready once ctx ends. If work or the admin port fails, WithAdmin stops the
// other. It returns after both have ended.
func (p Process) WithAdmin(ctx context.Context, o admin.Options, work func(context.Context) error) error {
	o.Log, o.Version = p.Log, p.Version
	o.Ready = append(o.Ready, admin.Check{Name: "process", Func: func(context.Context) error {
		if ctx.Err() != nil {
			return errStopping
		}
		return nil
	}})
	server := admin.New(o)

	operating, stopAdmin := context.WithCancel(context.WithoutCancel(ctx))
	defer stopAdmin()
	group, working := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Run(operating) })
	group.Go(func() error {
		defer stopAdmin()
		return work(working)
	})
	return group.Wait() //nolint:wrapcheck // the errors name their operation
}

const (
	schemaCheckTimeout = 5 * time.Second
	schemaPauseMin     = 250 * time.Millisecond
	schemaPauseMax     = 5 * time.Second
)

// AwaitSchema waits until PostgreSQL is available and returns nil if its schema is new
// enough for this binary. It returns a *postgres.SchemaTooOldError if the schema is too
// old, and a *postgres.UnsuitableError if the program cannot use the database. It repeats
// the check while PostgreSQL is unavailable, and returns nil when ctx ends. It closes the
// channel asked after the first check, unless it returns an error.
func (p Process) AwaitSchema(ctx context.Context, db *sqlx.DB, schema postgres.Schema, asked chan<- struct{}) error {
	for pause := schemaPauseMin; ; pause = min(2*pause, schemaPauseMax) {
		first := pause == schemaPauseMin
		err := p.checkSchema(ctx, db, schema)
		if _, ok := errors.AsType[*postgres.SchemaTooOldError](err); ok {
			return err
		}
		if _, ok := errors.AsType[*postgres.UnsuitableError](err); ok {
			return err
		}
		if first {
			close(asked)
		}
		if err == nil {
			if !first {
				p.Log.InfoContext(ctx, "postgresql available")
			}
			return nil
		}
		if first && ctx.Err() == nil {
			p.Log.ErrorContext(ctx, "postgresql unavailable, retrying", "err", err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

func (p Process) checkSchema(ctx context.Context, db *sqlx.DB, schema postgres.Schema) error {
	ctx, cancel := context.WithTimeout(ctx, schemaCheckTimeout)
	defer cancel()
	return schema.Check(ctx, db.DB, p.Log)
}
