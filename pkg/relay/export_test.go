package relay

import "time"

// Took is the time of the last batch that was sent once and settled.
func (r *Relay) Took() time.Duration { return time.Duration(r.took.Load()) }

// SetTook has the last batch have taken d.
func (r *Relay) SetTook(d time.Duration) { r.took.Store(int64(d)) }

// Idle tells whether no worker has a batch. What follows a batch in metrics, in
// the log and at Sentry is there then.
func (r *Relay) Idle() bool { return r.busy.Load() == 0 }
