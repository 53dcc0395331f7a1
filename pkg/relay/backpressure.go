package relay

import "time"

const (
	// maxLinger bounds the linger under backpressure.
	maxLinger = 30 * time.Second
	// maxBackpressure bounds how many times the linger is doubled.
	maxBackpressure = 8
)

// minLinger returns Options.Linger, doubled once for each level of backpressure.
func (r *Relay) minLinger() time.Duration {
	linger := r.o.Linger
	for range r.backpressure.Load() {
		linger = max(2*linger, time.Second)
	}
	return min(linger, max(maxLinger, r.o.Linger))
}

// raiseBackpressure follows an insert that the sink refused because it is overloaded.
func (r *Relay) raiseBackpressure() {
	if level := r.backpressure.Load(); level < maxBackpressure {
		r.backpressure.CompareAndSwap(level, level+1)
	}
}

// lowerBackpressure follows an insert that succeeded.
func (r *Relay) lowerBackpressure() {
	if level := r.backpressure.Load(); level > 0 {
		r.backpressure.CompareAndSwap(level, level-1)
	}
}
