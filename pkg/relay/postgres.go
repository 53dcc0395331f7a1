package relay

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// postgresState records whether PostgreSQL is available and suitable. It logs an outage
// once, and once more if the operator has to act.
type postgresState struct {
	mu       sync.Mutex
	failures int
	cause    error
	// outages counts events after which PostgreSQL is checked again. checkedAfter is the
	// value at the last successful check.
	outages, checkedAfter int
	unsafe                []string // the settings of the last warning

	checking sync.Mutex // held during a check
}

func newPostgresState() *postgresState { return &postgresState{outages: 1} }

// err returns the error of the outage, or nil.
func (p *postgresState) err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cause
}

// failed records a failure and returns the number of consecutive failures.
func (p *postgresState) failed(ctx context.Context, log *slog.Logger, err error) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, isUnsuitable := errors.AsType[*postgres.UnsuitableError](err)
	_, wasUnsuitable := errors.AsType[*postgres.UnsuitableError](p.cause)
	switch {
	case isUnsuitable && (!wasUnsuitable || err.Error() != p.cause.Error()):
		log.ErrorContext(ctx, "postgresql unsuitable, delivering nothing", "err", err)
	case p.cause == nil:
		log.ErrorContext(ctx, "outbox unavailable", "err", err)
	}
	p.cause = err
	p.failures++
	p.outages++
	return p.failures
}

// succeeded records that a transaction has succeeded. It does not end the outage if
// PostgreSQL is unsuitable: only a check does.
func (p *postgresState) succeeded(ctx context.Context, log *slog.Logger) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, unsuitable := errors.AsType[*postgres.UnsuitableError](p.cause); unsuitable && p.outages != p.checkedAfter {
		return
	}
	if p.cause != nil {
		log.InfoContext(ctx, "outbox available again")
	}
	p.cause, p.failures = nil, 0
}

// forget makes the next use of PostgreSQL check it again.
func (p *postgresState) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.outages++
}

// pending returns the number of outages if PostgreSQL was not checked after the last one,
// and otherwise 0.
func (p *postgresState) pending() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.outages == p.checkedAfter {
		return 0
	}
	return p.outages
}

// checked records a successful check that began after these outages. It reports whether
// the unsafe settings differ from those of the last check.
func (p *postgresState) checked(outages int, unsafe []string) (changed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.checkedAfter = outages
	changed = !slices.Equal(p.unsafe, unsafe)
	p.unsafe = unsafe
	return changed
}

// checkTimeout bounds a check of PostgreSQL.
const checkTimeout = 10 * time.Second

// checkPostgres checks PostgreSQL at the start, and after each outage and each change of
// history, before the relay cuts or claims.
func (r *Relay) checkPostgres(ctx context.Context) error {
	if r.postgres.pending() == 0 {
		return nil
	}
	r.postgres.checking.Lock()
	defer r.postgres.checking.Unlock()
	outages := r.postgres.pending()
	if outages == 0 { // another goroutine has checked it
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	unsafe, err := r.o.Store.Check(ctx)
	if err != nil {
		return err
	}
	if r.postgres.checked(outages, unsafe) {
		r.metrics.setUnsafe(unsafe)
		if len(unsafe) > 0 {
			r.log.WarnContext(ctx, "postgresql can lose committed events in a crash", "settings", strings.Join(unsafe, " "))
		}
	}
	return nil
}
