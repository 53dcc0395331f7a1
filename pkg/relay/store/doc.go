// Package store is the outbox as a relay uses it. It cuts the waiting events into
// batches, leases a batch to one worker at a time and deletes it once the sink
// holds it. It also keeps the dead letters.
package store
