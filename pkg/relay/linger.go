package relay

import "time"

// maxLinger bounds the linger under back-pressure.
const maxLinger = 30 * time.Second

// linger is the configured one, doubled for each time in a row that the sink
// asked for fewer inserts.
func (r *Relay) linger() time.Duration {
	linger := r.o.Linger
	for range r.strain.Load() {
		linger = max(2*linger, time.Second)
	}
	return min(linger, max(maxLinger, r.o.Linger))
}

const maxStrain = 8

func (r *Relay) strained() {
	if strain := r.strain.Load(); strain < maxStrain {
		r.strain.CompareAndSwap(strain, strain+1)
	}
}

func (r *Relay) relieved() {
	if strain := r.strain.Load(); strain > 0 {
		r.strain.CompareAndSwap(strain, strain-1)
	}
}
