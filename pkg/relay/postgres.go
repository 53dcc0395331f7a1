package relay

import (
	"context"
	"log/slog"
	"sync"
)

// postgresState remembers whether PostgreSQL answers, so that an outage is one
// line in the log.
type postgresState struct {
	mu       sync.Mutex
	failures int
	cause    error
}

func (p *postgresState) err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cause
}

// failed returns how many failures there have been in a row.
func (p *postgresState) failed(ctx context.Context, log *slog.Logger, err error) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cause == nil {
		log.ErrorContext(ctx, "the outbox cannot be worked on", "err", err)
	}
	p.cause = err
	p.failures++
	return p.failures
}

func (p *postgresState) succeeded(ctx context.Context, log *slog.Logger) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cause != nil {
		log.InfoContext(ctx, "the outbox can be worked on again")
	}
	p.cause, p.failures = nil, 0
}
