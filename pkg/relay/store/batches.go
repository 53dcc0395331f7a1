package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
)

// BatchState is what happens to a batch.
type BatchState string

// The states of batches. A batch is in the first state that matches.
const (
	InFlight  BatchState = "in_flight" // a worker holds the lease
	Failing   BatchState = "failing"   // an attempt has failed, and the data may be the cause
	PutOff    BatchState = "put_off"   // the next attempt is not due yet
	Unclaimed BatchState = "waiting"   // any worker can claim it
)

// BatchStates are all states of batches.
func BatchStates() []BatchState { return []BatchState{Unclaimed, InFlight, Failing, PutOff} }

// batchStateSQL is the state of a row of outbox_batches. A lease is an open transaction
// that has locked the row.
const (
	lockingSQL    = `SELECT transactionid::text FROM pg_locks WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted`
	batchStateSQL = `CASE WHEN batch.xmax::text IN (` + lockingSQL + `) THEN 'in_flight'
            WHEN batch.failures > 0 THEN 'failing'
            WHEN batch.next_attempt_at > clock_timestamp() THEN 'put_off'
            ELSE 'waiting' END`
)

// BatchInfo is a batch as operators see it.
type BatchInfo struct {
	ID            uuid.UUID  `db:"batch_id"        json:"batch_id"`
	State         BatchState `db:"state"           json:"state"`
	Events        int        `db:"event_count"     json:"events"`
	Bytes         int64      `db:"byte_count"      json:"bytes"`
	Attempts      int        `db:"attempts"        json:"attempts"`
	Failures      int        `db:"failures"        json:"failures"`
	Quarantined   bool       `db:"quarantined"     json:"quarantined"`
	Token         string     `db:"token"           json:"token"`
	CreatedAt     time.Time  `db:"created_at"      json:"created_at"`
	LastAttemptAt *time.Time `db:"last_attempt_at" json:"last_attempt_at"`
	// NextAttemptAt is nil if the batch is due.
	NextAttemptAt *time.Time `db:"next_attempt_at" json:"next_attempt_at"`
	LastError     string     `db:"last_error"      json:"last_error,omitempty"`
	Destination   string     `db:"destination"     json:"destination,omitempty"`
	// AwaitsInserts says that the batch waits for inserts of a lost history.
	AwaitsInserts bool `db:"awaits_inserts" json:"awaits_inserts"`
	// EventIDs are ranges of ids of outbox_events. It is empty in lists.
	EventIDs string `db:"event_ids" json:"event_ids,omitempty"`
}

const (
	batchColumns = batchStateSQL + ` AS state, batch_id, event_count, byte_count, attempts, failures, quarantined, token,
       created_at, last_attempt_at, CASE WHEN next_attempt_at > clock_timestamp() THEN next_attempt_at END AS next_attempt_at,
       coalesce(last_error, '') AS last_error, coalesce(destination, '') AS destination, ` + awaitsInsertsSQL + ` AS awaits_inserts`

	listBatchesSQL = `
SELECT * FROM (SELECT ` + batchColumns + `, '' AS event_ids FROM {schema}outbox_batches AS batch) AS listed
WHERE $1 = '' OR state = $1
ORDER BY batch_id LIMIT $2`

	readBatchSQL = `SELECT ` + batchColumns + `, event_ids::text AS event_ids FROM {schema}outbox_batches AS batch WHERE batch_id = $1`

	lockBatchSQL = `SELECT batch_id FROM {schema}outbox_batches WHERE batch_id = ANY ($4::uuid[]) AND NOT ` + awaitsInsertsSQL

	retryBatchesSQL = `
WITH retried AS (
    UPDATE {schema}outbox_batches SET next_attempt_at = '-infinity', quarantined = false
    WHERE batch_id IN (` + lockBatchSQL + ` FOR UPDATE SKIP LOCKED)
    RETURNING batch_id
)
` + auditSQL + ` FROM retried`

	splitBatchSQL = `
WITH split AS (
    UPDATE {schema}outbox_batches
    SET next_attempt_at = '-infinity', failures = greatest(failures, 1), last_error = coalesce(last_error, 'split by an operator')
    WHERE batch_id IN (` + lockBatchSQL + ` AND attempts > 0 AND event_count > 1 FOR UPDATE SKIP LOCKED)
    RETURNING batch_id
)
` + auditSQL + ` FROM split`
)

// Batches returns the first batches in a state, or in any state if it is empty, the oldest
// first.
func (s *Store) Batches(ctx context.Context, state BatchState, limit int) ([]BatchInfo, error) {
	var batches []BatchInfo
	if err := s.selectAll(ctx, &batches, listBatchesSQL, string(state), limit); err != nil {
		return nil, fmt.Errorf("list the batches: %w", err)
	}
	for i := range batches {
		batches[i].inUTC()
	}
	return batches, nil
}

func (b *BatchInfo) inUTC() {
	b.CreatedAt = b.CreatedAt.UTC()
	for _, at := range []**time.Time{&b.LastAttemptAt, &b.NextAttemptAt} {
		if *at != nil {
			utc := (*at).UTC()
			*at = &utc
		}
	}
}

// ErrNoBatch says that no batch with the id exists. Relays delete delivered batches.
var ErrNoBatch = errors.New("batch not found")

// Batch returns a batch, or ErrNoBatch.
func (s *Store) Batch(ctx context.Context, id uuid.UUID) (BatchInfo, error) {
	var batch BatchInfo
	err := s.get(ctx, &batch, readBatchSQL, id)
	if errors.Is(err, sql.ErrNoRows) {
		return BatchInfo{}, ErrNoBatch
	}
	if err != nil {
		return BatchInfo{}, fmt.Errorf("read the batch: %w", err)
	}
	batch.inUTC()
	return batch, nil
}

// RetryBatch makes the batch due, so that a worker attempts it at once. It returns an
// error that says why if the batch cannot be attempted now.
func (s *Store) RetryBatch(ctx context.Context, actor string, id uuid.UUID) error {
	return s.changeBatch(ctx, "retry the batch", retryBatchesSQL, actor, ActionRetryBatch, id)
}

// SplitBatch makes a batch that was attempted a failing batch, and makes it due. The
// relay then resolves it, inserts a sample of its events, and parts the other events into
// new batches. It returns an error that says why if the batch cannot be split.
func (s *Store) SplitBatch(ctx context.Context, actor string, id uuid.UUID) error {
	return s.changeBatch(ctx, "split the batch", splitBatchSQL, actor, ActionSplitBatch, id)
}

func (s *Store) changeBatch(ctx context.Context, operation, statement, actor, action string, id uuid.UUID) error {
	details := map[string]uuid.UUID{"batch_id": id}
	changed, err := s.act(ctx, operation, statement, actor, action, details, pq.Array([]uuid.UUID{id}))
	switch {
	case err != nil:
		return err
	case changed:
		return s.wakeFleet(ctx)
	}
	batch, err := s.Batch(ctx, id)
	switch {
	case err != nil:
		return err
	case batch.AwaitsInserts:
		return fmt.Errorf("%s: it waits for inserts of a lost history of PostgreSQL, until %s", operation, batch.NextAttemptAt.Format(time.RFC3339))
	case action == ActionSplitBatch && batch.Events == 1:
		return fmt.Errorf("%s: it has one event", operation)
	case action == ActionSplitBatch && batch.Attempts == 0:
		return fmt.Errorf("%s: it has not been attempted yet", operation)
	}
	return fmt.Errorf("%s: a worker is attempting it", operation)
}
