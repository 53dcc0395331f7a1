// Package store implements the relay's operations on the outbox. It cuts waiting events
// into batches, leases a batch to one worker at a time, and deletes delivered batches. It
// also keeps the dead letters.
package store
