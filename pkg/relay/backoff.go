package relay

import (
	"math/rand/v2"
	"time"
)

// backoff grows from base to limit, doubling, and spreads each delay over its
// upper half, so that what failed together does not come back together.
type backoff struct {
	base, limit time.Duration
}

// delay returns the pause after the n-th failure in a row, n from 1.
func (b backoff) delay(n int) time.Duration {
	d := b.base
	for ; n > 1 && d < b.limit; n-- {
		d *= 2
	}
	d = min(d, b.limit)
	return d/2 + rand.N(d/2+1) //nolint:gosec // spreads load, guards nothing
}
