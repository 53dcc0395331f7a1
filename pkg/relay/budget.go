package relay

import (
	"context"
	"sync"
)

// budget bounds the bytes of the batches that a process holds at once, however
// many workers it has. A batch that is larger than the whole budget goes when
// nothing else is held.
type budget struct {
	limit int64

	claiming sync.Mutex // one claim at a time knows what is free

	mu   sync.Mutex
	held int64
}

// unlimited is what a claim may take while nothing is held.
const unlimited = int64(1) << 62

// take runs claim with the bytes that it may take and records what it took.
// Zero bytes mean that it took nothing.
func (b *budget) take(ctx context.Context, claim func(ctx context.Context, maxBytes int64) (int64, error)) error {
	b.claiming.Lock()
	defer b.claiming.Unlock()
	b.mu.Lock()
	free := b.limit - b.held
	if b.held == 0 {
		free = unlimited
	}
	b.mu.Unlock()
	if free <= 0 {
		return nil
	}
	taken, err := claim(ctx, free)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held += taken
	return err
}

// give returns what a batch took.
func (b *budget) give(bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held -= bytes
}
