// Package store is the outbox as a relay uses it. It cuts waiting events into batches,
// leases a batch to one worker at a time, and deletes it when it is delivered. It also
// keeps the dead letters.
package store
