package relay

import "time"

const (
	// maxLinger bounds the linger under backpressure.
	maxLinger = 30 * time.Second
	// maxBackpressure bounds the number of times that the linger is doubled.
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

// raiseBackpressure raises the level by one. The relay calls it after an overloaded sink
// refused an insert.
func (r *Relay) raiseBackpressure() {
	if level := r.backpressure.Load(); level < maxBackpressure {
		r.backpressure.CompareAndSwap(level, level+1)
	}
}

// lowerBackpressure lowers the level by one. The relay calls it after a successful
// insert.
func (r *Relay) lowerBackpressure() {
	if level := r.backpressure.Load(); level > 0 {
		r.backpressure.CompareAndSwap(level, level-1)
	}
}
