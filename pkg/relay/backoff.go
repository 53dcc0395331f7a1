package relay

import (
	"math/rand/v2"
	"time"
)

// backoff doubles a delay from base up to limit. The pause is random, between half of
// the delay and the whole delay. So relays that failed together do not retry together.
type backoff struct {
	base, limit time.Duration
}

// delay returns the pause after n consecutive failures, n from 1.
func (b backoff) delay(n int) time.Duration {
	d := b.base
	for ; n > 1 && d < b.limit; n-- {
		d *= 2
	}
	d = min(d, b.limit)
	return d/2 + rand.N(d/2+1) //nolint:gosec // spreads load, guards nothing
}
