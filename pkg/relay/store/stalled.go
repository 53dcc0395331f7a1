package store

import (
	"context"
	"database/sql"
	"fmt"
	"math"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
)

// Waiting is what waits in the outbox: events that are not in a batch, and batches that
// a worker may claim.
type Waiting struct {
	// Events has the first event above the high watermark, and the late commit that the
	// last Poll has found.
	Events []WaitingEvent
	// Batches has the batches without a failure, and then the failing batches, each in
	// the order in which workers claim them. It has no batch that waits for its next
	// attempt as planned, and not more than 100 failing batches.
	Batches []WaitingBatch
	// Unattempted, Delivering and Failing count all batches: those without an attempt,
	// those without a failure, and those with a failure.
	Unattempted, Delivering, Failing int
	// Quarantined is the number of quarantined batches that wait for their next attempt as
	// planned. Quarantine has the event types in quarantine and their errors.
	Quarantined int
	Quarantine  string
	// Starving is the number of failing batches that are due for longer than the limit.
	Starving int
	// Cuts is the number of the fleet's cuts, 0 if the cursor is missing. SinceCut is the
	// time since the last cut, by PostgreSQL's clock.
	Cuts     int64
	SinceCut time.Duration
}

// WaitingEvent is an event that is not in a batch.
type WaitingEvent struct {
	ID  int64
	Age time.Duration // by PostgreSQL's clock
}

// WaitingBatch is a batch that a worker may claim.
type WaitingBatch struct {
	ID       uuid.UUID
	Events   int
	Attempts int
	Failures int
	// State changes with each attempt, and with each change of the batch.
	State string
	// Age is the time since the batch was written, and SinceAttempt the time since its
	// last attempt, negative if there was none. Both are by PostgreSQL's clock.
	Age, SinceAttempt time.Duration
	// Delay is the time until the batch is due. It is longer than any planned delay, or 0.
	Delay       time.Duration
	LastError   string
	Destination string // of the first attempt, or empty
	// Lock is the transaction that has locked the row last. It may have ended.
	Lock string
}

// Behind returns why a cut takes no event, or no partial batch, because of the batches that
// exist. isQueue is true if these batches are in front of the event. Otherwise they are
// failing, and their progress does not help the event.
func (w *Waiting) Behind() (reason string, isQueue bool) {
	switch {
	case w.Failing >= maxFailing:
		return fmt.Sprintf("no batches are cut because %d batches are failing", w.Failing), false
	case w.Delivering >= maxBatches:
		return fmt.Sprintf("no batches are cut because %d batches wait", w.Delivering), true
	case w.Unattempted > 0:
		return fmt.Sprintf("%d batches wait for their first attempt", w.Unattempted), true
	}
	return "", false
}

// IsElsewhere returns whether the first attempt of the batch went to another destination.
func (s *Store) IsElsewhere(batch WaitingBatch) bool {
	here := s.destinationName()
	return here != "" && batch.Destination != "" && batch.Destination != here
}

// maxShownFailing bounds the failing batches of a Waiting.
const maxShownFailing = 100

// waitingInOutboxSQL returns one row for each event and batch of a Waiting, or one row
// without them. It reads what a cut and a claim read, and takes no lock of a row. $1 and
// $2 are the hints for the cursor and the batches, $3 is a late commit or null. $4 is the
// longest planned delay in seconds, and $7 that of a quarantined batch. $5 is the limit of
// Waiting.Starving in seconds. A time in the future, after the clock was set back, counts
// as now.
const waitingInOutboxSQL = `
WITH cursor AS MATERIALIZED (
    SELECT cuts, high_watermark, extract(epoch FROM clock_timestamp() - last_cut_at)::float8 AS since_cut
    FROM {schema}outbox_cursor WHERE cuts >= $1 ORDER BY cuts DESC LIMIT 1
),
batch AS MATERIALIZED (
    SELECT batch_id, event_ids, event_count, attempts, failures, token, last_attempt_at, next_attempt_at, created_at,
           quarantined, last_error, destination, xmax::text AS lock,
           next_attempt_at > clock_timestamp() AND next_attempt_at <= clock_timestamp() + greatest(` + insertsEndSQL + `,
               make_interval(secs => CASE WHEN quarantined THEN $7::float8 ELSE $4::float8 END)) AS planned
    FROM {schema}outbox_batches
    WHERE batch_id >= $2
),
item AS (
    SELECT 0 AS kind, id AS event_id, published_at AS since, NULL::timestamptz AS turn, NULL::uuid AS batch_id
    FROM {schema}outbox_events
    WHERE id = $3 AND NOT EXISTS (SELECT FROM batch WHERE event_ids @> id)
  UNION ALL
    (SELECT 0, id, published_at, NULL, NULL
     FROM (
         SELECT unnest(int8multirange(int8range(coalesce((SELECT high_watermark FROM cursor), 0), NULL, '()')) -
                       coalesce((SELECT range_agg(event_ids) FROM batch), '{}')) AS ids
     ) AS gap
     CROSS JOIN LATERAL (
         SELECT id, published_at FROM {schema}outbox_events
         WHERE id >= lower(gap.ids) AND id < coalesce(upper(gap.ids), 9223372036854775807)
         ORDER BY id LIMIT 1
     ) AS first
     LIMIT 1)
  UNION ALL
    SELECT 1, NULL, created_at, NULL, batch_id FROM batch WHERE failures = 0 AND NOT planned
  UNION ALL
    (SELECT 2, NULL, created_at, coalesce(last_attempt_at, '-infinity'), batch_id
     FROM batch WHERE failures > 0 AND NOT planned
     ORDER BY 4, batch_id LIMIT $6)
)
SELECT counts.unattempted, counts.delivering, counts.failing, counts.starving, counts.quarantined,
       coalesce((SELECT string_agg(event_type || ': ' || error, ', ' ORDER BY event_type)
                 FROM {schema}outbox_quarantine), '')                               AS quarantine,
       coalesce(cursor.cuts, 0)                                                     AS cuts,
       coalesce(cursor.since_cut, 0)                                                AS since_cut,
       item.event_id, item.batch_id,
       coalesce(extract(epoch FROM clock_timestamp() - item.since), 0)::float8      AS age,
       coalesce(event_count, 0)                                                     AS events,
       coalesce(attempts, 0)                                                        AS attempts,
       coalesce(failures, 0)                                                        AS failures,
       concat_ws(' ', token, attempts, last_attempt_at, failures, event_count)      AS state,
       extract(epoch FROM clock_timestamp() - last_attempt_at)::float8              AS since_attempt,
       CASE WHEN next_attempt_at > clock_timestamp()
            THEN extract(epoch FROM least(next_attempt_at, clock_timestamp() + interval '100 years') - clock_timestamp())
            ELSE 0 END::float8                                                      AS delay,
       coalesce(last_error, '')                                                     AS last_error,
       coalesce(destination, '')                                                    AS destination,
       coalesce(batch.lock, '')                                                     AS batch_lock
FROM (
    SELECT count(*) FILTER (WHERE failures = 0 AND attempts = 0) AS unattempted,
           count(*) FILTER (WHERE failures = 0)                  AS delivering,
           count(*) FILTER (WHERE failures > 0)                  AS failing,
           count(*) FILTER (WHERE quarantined AND planned)       AS quarantined,
           count(*) FILTER (WHERE failures > 0 AND NOT planned
               AND least(greatest(created_at, last_attempt_at, next_attempt_at), clock_timestamp())
                   < clock_timestamp() - make_interval(secs => $5)) AS starving
    FROM batch
) AS counts
LEFT JOIN cursor ON true
LEFT JOIN item ON true
LEFT JOIN batch USING (batch_id)
ORDER BY kind, event_id, turn, batch_id`

// Waiting returns what waits in the outbox. A failing batch that is due for longer than
// starving counts as starving. The cost does not grow with the outbox.
func (s *Store) Waiting(ctx context.Context, starving time.Duration) (Waiting, error) {
	var rows []struct {
		Unattempted  int             `db:"unattempted"`
		Delivering   int             `db:"delivering"`
		Failing      int             `db:"failing"`
		Starving     int             `db:"starving"`
		Quarantined  int             `db:"quarantined"`
		Quarantine   string          `db:"quarantine"`
		Cuts         int64           `db:"cuts"`
		SinceCut     float64         `db:"since_cut"`
		EventID      sql.NullInt64   `db:"event_id"`
		BatchID      uuid.NullUUID   `db:"batch_id"`
		Age          float64         `db:"age"`
		Events       int             `db:"events"`
		Attempts     int             `db:"attempts"`
		Failures     int             `db:"failures"`
		State        string          `db:"state"`
		SinceAttempt sql.NullFloat64 `db:"since_attempt"`
		Delay        float64         `db:"delay"`
		LastError    string          `db:"last_error"`
		Destination  string          `db:"destination"`
		BatchLock    string          `db:"batch_lock"`
	}
	s.mu.Lock()
	cuts, batchHint := s.history.cuts, s.oldestBatch
	late := sql.NullInt64{Int64: s.late.from + 1, Valid: s.late.ceiling > 0 && s.late.from < math.MaxInt64}
	s.mu.Unlock()
	if err := s.selectAll(ctx, &rows, waitingInOutboxSQL, cuts, batchHint, late,
		max(s.o.MaxDelay.Seconds(), s.unverifiedSeconds()), starving.Seconds(), maxShownFailing, s.longestQuarantine()); err != nil {
		return Waiting{}, fmt.Errorf("read what waits in the outbox: %w", err)
	}
	var w Waiting
	for _, row := range rows {
		w.Unattempted, w.Delivering, w.Failing, w.Starving = row.Unattempted, row.Delivering, row.Failing, row.Starving
		w.Quarantined, w.Quarantine = row.Quarantined, row.Quarantine
		w.Cuts, w.SinceCut = row.Cuts, seconds(row.SinceCut)
		switch {
		case row.EventID.Valid:
			w.Events = append(w.Events, WaitingEvent{row.EventID.Int64, seconds(row.Age)})
		case row.BatchID.Valid:
			batch := WaitingBatch{
				ID: row.BatchID.UUID, Events: row.Events, Attempts: row.Attempts, Failures: row.Failures, State: row.State,
				Age: seconds(row.Age), SinceAttempt: -1, Delay: seconds(row.Delay),
				LastError: row.LastError, Destination: row.Destination, Lock: row.BatchLock,
			}
			if row.SinceAttempt.Valid {
				batch.SinceAttempt = seconds(row.SinceAttempt.Float64)
			}
			w.Batches = append(w.Batches, batch)
		}
	}
	return w, nil
}

// Locker is a session or a prepared transaction that holds a lock, or waits for one.
type Locker struct {
	// PID is the process of the session, or 0 for a prepared transaction.
	PID      int    `db:"pid"`
	Prepared string `db:"prepared"` // the identifier of the prepared transaction
	// Lock is the transaction whose row locks the Locker holds, or empty.
	Lock string `db:"lock"`
	// Mode and Table describe a lock on a table that statements of relays conflict with.
	// Both are empty if the Locker blocks another session by another lock.
	Mode  string `db:"mode"`
	Table string `db:"table_name"`
	// Granted is false if the Locker waits for the lock. The sessions that come later wait
	// behind it.
	Granted     bool   `db:"granted"`
	Application string `db:"application"`
	User        string `db:"user_name"`
	// State and Seconds, the age of the transaction, are unknown if the role of the relay
	// may not see the session.
	State   string          `db:"state"`
	Seconds sql.NullFloat64 `db:"seconds"`
}

// IsRowLock returns whether Mode is the lock of a session that has locked rows of Table.
func (l Locker) IsRowLock() bool { return l.Mode == "RowShareLock" || l.Mode == "RowExclusiveLock" }

// String describes the session, for an operator who may have to end it.
func (l Locker) String() string {
	if l.PID == 0 {
		return fmt.Sprintf("the prepared transaction %q", l.Prepared)
	}
	details := fmt.Sprintf("session %d (application %q, user %q", l.PID, l.Application, l.User)
	if l.State != "" {
		details += ", " + l.State
	}
	if l.Seconds.Valid {
		details += ", in a transaction for " + seconds(l.Seconds.Float64).Round(time.Second).String()
	}
	return details + ")"
}

// lockersSQL returns the sessions that hold row locks as the transactions $1. It also
// returns the sessions that hold a lock on a table of the outbox that excludes relays, or
// wait for it, the sessions that hold a row lock of the cursor, and the sessions that block any session waiting for a table of the outbox.
// It reads no table of the outbox, so it does not wait for these locks.
const lockersSQL = `
WITH outbox AS (
    SELECT oid, relname::text AS name FROM pg_class
    WHERE oid IN (to_regclass('{schema_literal}outbox_events'), to_regclass('{schema_literal}outbox_batches'),
                  to_regclass('{schema_literal}outbox_cursor'), to_regclass('{schema_literal}outbox_history'),
                  to_regclass('{schema_literal}outbox_fuse'), to_regclass('{schema_literal}outbox_pause'),
                  to_regclass('{schema_literal}outbox_quarantine'))
),
lock AS MATERIALIZED (SELECT * FROM pg_locks WHERE pid IS DISTINCT FROM pg_backend_pid()),
on_table AS (
    SELECT lock.*, outbox.name FROM lock
    JOIN outbox ON lock.relation = outbox.oid AND lock.database = ` + databaseSQL + `
    WHERE locktype = 'relation'
),
found AS (
    SELECT pid, virtualtransaction, transactionid::text AS lock, '' AS mode, '' AS name, true AS granted
    FROM lock
    WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted AND transactionid::text = ANY($1::text[])
  UNION
    SELECT pid, virtualtransaction, '', mode, name, granted
    FROM on_table
    WHERE mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
       OR name = 'outbox_cursor' AND granted AND mode IN ('RowShareLock', 'RowExclusiveLock')
  UNION
    SELECT blocker, NULL, '', '', '', true
    FROM (SELECT DISTINCT pid FROM on_table WHERE NOT granted) AS waiting
    CROSS JOIN LATERAL unnest(pg_blocking_pids(pid)) AS blocker
    WHERE blocker > 0
)
SELECT coalesce(found.pid, 0)                                           AS pid,
       coalesce(prepared.gid, '')                                       AS prepared,
       found.lock, found.mode, found.name                               AS table_name, found.granted,
       coalesce(activity.application_name, '')                          AS application,
       coalesce(activity.usename::text, '')                             AS user_name,
       coalesce(activity.state, '')                                     AS state,
       extract(epoch FROM clock_timestamp() - activity.xact_start)::float8 AS seconds
FROM found
LEFT JOIN pg_stat_activity AS activity ON activity.pid = found.pid
LEFT JOIN lock AS own ON found.pid IS NULL AND own.virtualtransaction = found.virtualtransaction AND own.locktype = 'transactionid'
LEFT JOIN pg_prepared_xacts AS prepared ON prepared.transaction = own.transactionid
ORDER BY found.lock DESC, found.name DESC, seconds DESC NULLS LAST`

// Lockers returns the sessions that may prevent the relays from working: the holders of
// row locks as one of the transactions, and the sessions that exclude relays from a table
// of the outbox. A cut that is in progress is one of them.
func (s *Store) Lockers(ctx context.Context, transactions []string) ([]Locker, error) {
	var lockers []Locker
	if err := s.selectAll(ctx, &lockers, lockersSQL, pq.Array(transactions)); err != nil {
		return nil, fmt.Errorf("find the holders of locks: %w", err)
	}
	return lockers, nil
}
