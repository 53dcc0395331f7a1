package relay

import (
	"context"
	"sync"
)

// budget bounds the bytes of all batches that the process holds. A batch that is
// larger than the whole budget is claimed when no other is held.
type budget struct {
	limit int64

	claiming sync.Mutex // held by a claim, so that what is free stays free

	mu   sync.Mutex
	held int64
}

// unlimited is the bound of a claim while no batch is held.
const unlimited = int64(1) << 62

// take calls claim with the bytes that it may take, and records how many it took.
// Zero bytes mean that it claimed no batch.
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

// give returns the bytes of a batch.
func (b *budget) give(bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held -= bytes
}
