package store

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
)

// Task is a task of the fleet's housekeeping.
type Task string

// The tasks of the fleet.
const (
	TaskVacuum      Task = "vacuum"       // vacuum outbox_events
	TaskDeadLetters Task = "dead_letters" // delete old dead letters
	TaskAudit       Task = "audit"        // delete old rows of outbox_audit
)

const (
	// taskLease is the time after which another relay can lease the task of a dead relay.
	// statement_timeout ends each statement of a task earlier.
	taskLease = 10 * time.Minute
	// vacuumRows is the number of dead rows of outbox_events above which a relay vacuums it.
	vacuumRows = 100_000
	// deletedAtOnce bounds the rows of a transaction that deletes old rows.
	deletedAtOnce = 1_000

	// leaseTasksSQL leases the tasks of $2 that are due for the relay $1, for $3 seconds. A
	// task that is due in more than a day is due after the clock was set back.
	leaseTasksSQL = `
WITH missing AS (
    INSERT INTO {schema}outbox_housekeeping (task, holder, leased_until)
    SELECT name, $1, clock_timestamp() + make_interval(secs => $3) FROM unnest($2::text[]) AS name
    WHERE NOT EXISTS (SELECT FROM {schema}outbox_housekeeping WHERE task = name)
    ON CONFLICT DO NOTHING
    RETURNING task
),
leased AS (
    UPDATE {schema}outbox_housekeeping SET holder = $1, leased_until = clock_timestamp() + make_interval(secs => $3)
    WHERE task = ANY ($2::text[])
      AND (leased_until < clock_timestamp() OR leased_until > clock_timestamp() + interval '1 day')
      AND (due_at <= clock_timestamp() OR due_at > clock_timestamp() + interval '1 day')
    RETURNING task
)
SELECT task FROM missing UNION ALL SELECT task FROM leased ORDER BY task`

	// endTaskSQL ends the lease of the task $2 by the relay $1. The task is due again after
	// $3 seconds. $4 is true if the task has succeeded.
	endTaskSQL = `
UPDATE {schema}outbox_housekeeping
SET leased_until    = '-infinity',
    due_at          = clock_timestamp() + make_interval(secs => $3),
    last_success_at = CASE WHEN $4 THEN clock_timestamp() ELSE last_success_at END,
    blocked_to      = coalesce($5, blocked_to)
WHERE task = $2 AND holder = $1`

	taskSuccessesSQL = `SELECT task, last_success_at FROM {schema}outbox_housekeeping WHERE last_success_at IS NOT NULL`

	// deadRowsSQL looks at the dead rows of outbox_events. The horizon is the oldest
	// transaction whose deleted rows a session, a prepared transaction or a replication slot
	// still needs. A snapshot's age is known if the role may see the session. The first look
	// at a session that the role may not see has the age 0.
	deadRowsSQL = `
WITH holder AS (
    SELECT age(backend_xmin) AS transactions, extract(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds,
           pid || ' ' || backend_xmin AS name
    FROM pg_stat_activity
    WHERE backend_xmin IS NOT NULL AND pid <> pg_backend_pid() AND datid = (SELECT oid FROM pg_database WHERE datname = current_database())
  UNION ALL
    SELECT age(transaction), extract(epoch FROM clock_timestamp() - prepared)::float8, gid FROM pg_prepared_xacts
    WHERE database = current_database()
  UNION ALL
    SELECT age(xmin), NULL, slot_name || ' ' || xmin FROM pg_replication_slots WHERE xmin IS NOT NULL
)
SELECT coalesce(pg_stat_get_dead_tuples('{schema_literal}outbox_events'::regclass), 0) AS dead_rows,
       pg_has_role(relowner, 'USAGE') OR CASE WHEN current_setting('server_version_num')::int >= 170000
           THEN has_table_privilege(pg_class.oid, 'MAINTAIN') ELSE false END AS may_vacuum,
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS next_transaction,
       coalesce((SELECT max(transactions) FROM holder), 0) AS horizon_age,
       coalesce((SELECT max(seconds) FROM holder), 0) AS horizon_seconds,
       coalesce((SELECT name FROM holder WHERE seconds IS NULL ORDER BY transactions DESC LIMIT 1), '') AS unseen_holder,
       coalesce((SELECT blocked_to FROM {schema}outbox_housekeeping WHERE task = 'vacuum'), 0) AS blocked_to
FROM pg_class WHERE oid = '{schema_literal}outbox_events'::regclass`

	deleteDeadLettersSQL = `
DELETE FROM {schema}outbox_dead_letters WHERE id IN (
    SELECT id FROM {schema}outbox_dead_letters WHERE dead_lettered_at < clock_timestamp() - make_interval(secs => $1)
    ORDER BY id LIMIT $2
)`

	deleteAuditSQL = `
DELETE FROM {schema}outbox_audit WHERE id IN (
    SELECT id FROM {schema}outbox_audit WHERE at < clock_timestamp() - make_interval(secs => $1)
    ORDER BY id LIMIT $2
)`
)

// LeaseTasks leases the tasks that are due and that no other relay has leased. The relay
// ends each of them by EndTask. relay is the ID of its Member.
func (s *Store) LeaseTasks(ctx context.Context, relay uuid.UUID, tasks []Task) ([]Task, error) {
	var leased []Task
	if err := s.selectAll(ctx, &leased, leaseTasksSQL, relay, pq.Array(tasks), taskLease.Seconds()); err != nil {
		return nil, fmt.Errorf("lease tasks: %w", err)
	}
	return leased, nil
}

// EndTask ends the lease of a task. The task is due again after a pause.
func (s *Store) EndTask(ctx context.Context, relay uuid.UUID, task Task, pause time.Duration, succeeded bool) error {
	return s.endTask(ctx, relay, task, pause, succeeded, nil)
}

func (s *Store) endTask(ctx context.Context, relay uuid.UUID, task Task, pause time.Duration, succeeded bool, blockedTo *int64) error {
	if _, err := s.exec(ctx, endTaskSQL, relay, string(task), pause.Seconds(), succeeded, blockedTo); err != nil {
		return fmt.Errorf("end the task %s: %w", task, err)
	}
	return nil
}

// TaskSuccesses returns the time of the last success of each task that has succeeded.
func (s *Store) TaskSuccesses(ctx context.Context) (map[Task]time.Time, error) {
	var rows []struct {
		Task Task      `db:"task"`
		At   time.Time `db:"last_success_at"`
	}
	if err := s.selectAll(ctx, &rows, taskSuccessesSQL); err != nil {
		return nil, fmt.Errorf("read the tasks: %w", err)
	}
	successes := make(map[Task]time.Time, len(rows))
	for _, row := range rows {
		successes[row.Task] = row.At
	}
	return successes, nil
}

// DeadRows are the rows of outbox_events that were deleted, and that no vacuum has removed.
type DeadRows struct {
	Rows int64 `db:"dead_rows"`
	// MayVacuum says that the role may vacuum the table.
	MayVacuum bool `db:"may_vacuum"`
	// HorizonSeconds is the age of the oldest snapshot that keeps dead rows, as far as the
	// role may see it. UnseenHolder names the oldest snapshot whose age it may not see, or is
	// empty.
	HorizonSeconds float64 `db:"horizon_seconds"`
	UnseenHolder   string  `db:"unseen_holder"`

	NextTransaction int64 `db:"next_transaction"`
	HorizonAge      int64 `db:"horizon_age"`
	BlockedTo       int64 `db:"blocked_to"`
}

// Due returns whether a vacuum is worth it: many rows are dead, the role may vacuum, and
// the snapshot is gone that has kept rows from the last vacuum.
func (d *DeadRows) Due() bool {
	return d.MayVacuum && d.Rows >= vacuumRows && d.NextTransaction-d.HorizonAge >= d.BlockedTo
}

// DeadRows looks at the dead rows of outbox_events. The cost does not grow with the outbox.
func (s *Store) DeadRows(ctx context.Context) (DeadRows, error) {
	var dead DeadRows
	if err := s.get(ctx, &dead, deadRowsSQL); err != nil {
		return DeadRows{}, fmt.Errorf("look at the dead rows: %w", err)
	}
	return dead, nil
}

// Vacuum vacuums outbox_events, and ends the relay's lease of TaskVacuum. It never
// truncates the table, because truncation locks out publishers, and it does not wait for a
// lock. before is the look that has found the vacuum due.
func (s *Store) Vacuum(ctx context.Context, relay uuid.UUID, before DeadRows, pause time.Duration) error {
	if _, err := s.db.ExecContext(ctx, s.sql("VACUUM (TRUNCATE false, SKIP_LOCKED true) {schema}outbox_events")); err != nil {
		return fmt.Errorf("vacuum outbox_events: %w", err)
	}
	after, err := s.DeadRows(ctx)
	if err != nil {
		return err
	}
	blockedTo := int64(0)
	if after.Rows >= vacuumRows/2 && after.Rows >= before.Rows/2 {
		blockedTo = before.NextTransaction
	}
	return s.endTask(ctx, relay, TaskVacuum, pause, true, &blockedTo)
}

// DeleteDeadLetters deletes the dead letters that are older than the retention. It returns
// their number, also with an error.
func (s *Store) DeleteDeadLetters(ctx context.Context, retention time.Duration) (int64, error) {
	return s.deleteOld(ctx, "delete old dead letters", deleteDeadLettersSQL, retention)
}

// DeleteAudit deletes the rows of outbox_audit that are older than the retention. It
// returns their number, also with an error.
func (s *Store) DeleteAudit(ctx context.Context, retention time.Duration) (int64, error) {
	return s.deleteOld(ctx, "delete old rows of outbox_audit", deleteAuditSQL, retention)
}

func (s *Store) deleteOld(ctx context.Context, operation, statement string, retention time.Duration) (deleted int64, err error) {
	for {
		result, err := s.exec(ctx, statement, retention.Seconds(), deletedAtOnce)
		if err != nil {
			return deleted, fmt.Errorf("%s: %w", operation, err)
		}
		rows, err := result.RowsAffected()
		if err != nil {
			return deleted, fmt.Errorf("%s: %w", operation, err)
		}
		deleted += rows
		if rows < deletedAtOnce {
			return deleted, nil
		}
	}
}
