package relay

import (
	"context"
	"sync"
)

// budget bounds the bytes of all batches that the process holds. A batch that is larger
// than the budget is claimed only while the process holds no other batch.
type budget struct {
	limit int64

	claiming sync.Mutex // held during a claim, so that no other claim uses the free bytes

	mu   sync.Mutex
	held int64
}

// unlimited is the bound of a claim while the process holds no batch.
const unlimited = int64(1) << 62

// take calls claim with the number of free bytes. claim returns the bytes of the claimed
// batch, or zero if it has found no batch. take records these bytes.
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

// give frees the bytes of a batch.
func (b *budget) give(bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held -= bytes
}
