package relay

import (
	"context"
	"log/slog"
	"sync"
)

// postgresState records whether PostgreSQL is available. It logs an outage once.
type postgresState struct {
	mu       sync.Mutex
	failures int
	cause    error
}

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
	if p.cause == nil {
		log.ErrorContext(ctx, "outbox unavailable", "err", err)
	}
	p.cause = err
	p.failures++
	return p.failures
}

func (p *postgresState) succeeded(ctx context.Context, log *slog.Logger) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cause != nil {
		log.InfoContext(ctx, "outbox available again")
	}
	p.cause, p.failures = nil, 0
}
