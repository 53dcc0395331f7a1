package relay

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// blindness records that presence checks cannot see all rows of the sink. It logs this
// once. Other batches are still inserted, because their first attempt needs no check.
type blindness struct {
	// lifetime is the time for which a result is valid. Another relay may resolve the
	// batch, and this relay does not notice.
	lifetime time.Duration

	mu    sync.Mutex
	batch uuid.UUID
	cause *sink.BlindError
	until time.Time
}

// err returns the error of the last presence check that could not see all rows, or nil.
func (b *blindness) err() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cause == nil || !time.Now().Before(b.until) {
		return nil
	}
	return b.cause
}

// failed records a presence check of the batch that could not see all rows.
func (b *blindness) failed(ctx context.Context, log *slog.Logger, batch uuid.UUID, cause *sink.BlindError) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if b.cause == nil || !now.Before(b.until) {
		log.ErrorContext(ctx, "presence check cannot see all rows", "err", cause)
	}
	b.batch, b.cause, b.until = batch, cause, now.Add(b.lifetime)
}

// succeeded records a presence check of the batch that had a result.
func (b *blindness) succeeded(ctx context.Context, log *slog.Logger, batch uuid.UUID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cause != nil && b.batch == batch {
		log.InfoContext(ctx, "presence check sees all rows again")
		b.cause = nil
	}
}
