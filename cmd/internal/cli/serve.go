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

var errStopping = errors.New("told to stop")

// WithAdmin does the work beside an admin port, which is open from the start to
// the very end, and not ready from when ctx ends. It returns when both are
// over; where one fails, the other is told to stop.
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
	return group.Wait() //nolint:wrapcheck // the parts' own
}

const (
	schemaCheckTimeout = 5 * time.Second
	schemaPauseMin     = 250 * time.Millisecond
	schemaPauseMax     = 5 * time.Second
)

// AwaitSchema returns nil once PostgreSQL has a schema that this binary can
// work with, and a *postgres.SchemaTooOldError if it has an older one. As long
// as it cannot be asked it is asked again. When ctx ends it returns nil.
// It closes asked after the first answer or failure, but not for a schema that
// is too old.
func (p Process) AwaitSchema(ctx context.Context, db *sqlx.DB, schema postgres.Schema, asked chan<- struct{}) error {
	for pause := schemaPauseMin; ; pause = min(2*pause, schemaPauseMax) {
		first := pause == schemaPauseMin
		err := p.checkSchema(ctx, db, schema)
		if _, ok := errors.AsType[*postgres.SchemaTooOldError](err); ok {
			return err
		}
		if first {
			close(asked)
		}
		if err == nil {
			if !first {
				p.Log.InfoContext(ctx, "postgresql can be used now")
			}
			return nil
		}
		if first && ctx.Err() == nil {
			p.Log.ErrorContext(ctx, "postgresql cannot be used: not ready until it can", "err", err)
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
