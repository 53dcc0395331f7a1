package store

import "strings"

// All of the store's SQL. It relies on the settings of Session, which turn off sequential
// scans and just-in-time compilation. The plans then do not depend on statistics.
// Statistics are always out of date for tables whose rows are replaced all the time.

// lockCursorSQL takes the lock of the fleet for a cut. It returns no row if another
// process holds the lock. An old transaction can keep many dead versions of the row. The
// order and the lower bound make the statement read the live version first. set_config
// limits the time for which a suspended or unreachable process holds the lock.
const lockCursorSQL = `
SELECT cuts, low_watermark, next_low_watermark, high_watermark,
       extract(epoch FROM clock_timestamp() - last_cut_at)           AS since_cut,
       extract(epoch FROM clock_timestamp() - next_low_watermark_at) AS since_watermark,
       clock_timestamp()                                             AS cut_at,
       greatest(clock_timestamp(), last_batch_at + interval '1 ms')  AS batch_at,
       set_config('idle_in_transaction_session_timeout', '10s', true) AS ignored
FROM {schema}outbox_cursor
WHERE cuts >= $1
ORDER BY cuts DESC
LIMIT 1
FOR UPDATE SKIP LOCKED`

// cursorExistsSQL returns whether the cursor has the key $1 or a later key.
const cursorExistsSQL = `SELECT EXISTS (SELECT FROM {schema}outbox_cursor WHERE cuts >= $1)`

// waitingSQL counts the batches, and returns whether they belong to the current history
// of PostgreSQL. Failing batches have a count of their own, so that they do not prevent
// cuts.
const waitingSQL = `
SELECT count(*) FILTER (WHERE failures = 0)                  AS batches,
       count(*) FILTER (WHERE failures = 0 AND attempts = 0) AS unattempted,
       count(*) FILTER (WHERE failures > 0)                  AS failing,
       (SELECT incarnation FROM {schema}outbox_history)      AS incarnation,
       ` + sameHistorySQL + ` AS same_history,
       ` + notPausedSQL + ` AS running
FROM {schema}outbox_batches
WHERE batch_id >= $2`

// isForeignSQL is for the first cut of an outbox. It is true if another outbox has filled
// the tables: they have batches, or the first ids are missing.
//
// The first ids can also be missing because their transactions were rolled back, or have
// not committed. An open transaction holds a lock on the table. The numbers bound the ids
// of these transactions. Events with such ids are foreign if they were published before
// the outbox existed, or if the sequence has not returned their ids, or if the role may not
// read the sequence.
const isForeignSQL = `
SELECT EXISTS (SELECT FROM {schema}outbox_batches)
    OR EXISTS (
        SELECT FROM (SELECT id, published_at FROM {schema}outbox_events ORDER BY id LIMIT 1) AS first
        WHERE id > CASE WHEN EXISTS (` + publishersSQL + `) THEN 10000 ELSE 1000 END
           OR id > 1 AND (published_at < (SELECT recorded_at FROM {schema}outbox_history)
                          OR coalesce((SELECT max(id) FROM {schema}outbox_events) > ` + sequenceValueSQL + `, true)))`

// publishersSQL returns the open transactions that have inserted into outbox_events. An
// INSERT takes the lock before it draws an id from the sequence. PostgreSQL releases the
// lock after other transactions can see the commit. Settlements hold the lock too.
const publishersSQL = `
SELECT virtualtransaction FROM pg_locks
WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
  AND database = ` + databaseSQL + `
  AND relation = '{schema_literal}outbox_events'::regclass
  AND pid IS DISTINCT FROM pg_backend_pid()`

const (
	databaseSQL = `(SELECT oid FROM pg_database WHERE datname = current_database())`

	// sameServerSQL and sameTimelineSQL compare outbox_history with diehard_server. An
	// unknown identifier equals any other.
	sameServerSQL   = `(history.system_identifier = server.system_identifier OR '' IN (history.system_identifier, server.system_identifier))`
	sameTimelineSQL = `history.timeline = server.timeline`

	// isTimelineUnknownSQL is true if diehard_server returns the start of the server instead.
	isTimelineUnknownSQL = `server.timeline LIKE 'start %'`

	// sameHistorySQL is true if outbox_history describes this database, if the row was
	// not copied, if $1 is null or the incarnation, and if no subscription writes into
	// the outbox.
	sameHistorySQL = `(EXISTS (
    SELECT FROM {schema}outbox_history AS history, {schema}diehard_server() AS server
    WHERE history.xmin = history.recorded_by
      AND ` + sameServerSQL + `
      AND {same_timeline}
      AND history.database_oid = ` + databaseSQL + `
      AND history.incarnation = coalesce($1::uuid, history.incarnation)
) AND NOT EXISTS (` + subscriptionsSQL + `))`

	// sameCutsSQL is true if the history still has the cut $2.
	sameCutsSQL = `EXISTS (SELECT FROM {schema}outbox_cursor WHERE cuts >= $2)`

	// subscriptionsSQL returns the subscriptions of logical replication that write into
	// the outbox. A subscription that was disabled can still have a worker.
	subscriptionsSQL = `
SELECT DISTINCT subname FROM pg_subscription_rel
JOIN pg_subscription ON pg_subscription.oid = srsubid
WHERE srrelid IN ('{schema_literal}outbox_events'::regclass, '{schema_literal}outbox_batches'::regclass)
  AND (subenabled OR EXISTS (SELECT FROM pg_stat_get_subscription(pg_subscription.oid) WHERE pid IS NOT NULL))`

	// sequenceValueSQL is the last id that the sequence has returned, or null if the role
	// may not read the sequence.
	sequenceSQL      = `pg_get_serial_sequence('{schema_literal}outbox_events', 'id')`
	sequenceValueSQL = `CASE WHEN has_sequence_privilege(` + sequenceSQL + `, 'USAGE, SELECT')
            THEN coalesce(pg_sequence_last_value(` + sequenceSQL + `), 0) END`
)

// uncutSQL returns the first $3 events above the id $2 that are not in a batch. The
// result is one value for readUncut, with the id and the bytes of each event. The relay
// puts the events into batches, because the server would take several times longer for
// that than for finding them. The primary key returns the events in order, gap by gap
// between batches. Events in batches are not read.
const uncutSQL = `
WITH gap AS (
    SELECT unnest(int8multirange(int8range($2, NULL, '()')) - coalesce(range_agg(event_ids), '{}')) AS ids
    FROM {schema}outbox_batches
    WHERE batch_id >= $1
)
SELECT coalesce(string_agg(int8send(id) || int4send(context_bytes + ` + eventOverheadSQL + `), ''), '')
FROM (
    SELECT id, context_bytes
    FROM gap
    CROSS JOIN LATERAL (
        SELECT id, context_bytes
        FROM {schema}outbox_events
        WHERE id >= lower(gap.ids) AND id < coalesce(upper(gap.ids), 9223372036854775807)
        ORDER BY id
    ) AS event
    LIMIT $3
) AS uncut`

// cutSQL writes the batch $1 with the events $2. $3 is the number of the events, and $4
// their bytes. An unverified event may have been inserted under a token that is lost.
// Without the token, the relay cannot find such an insert in flight. $5 is the result of
// unverifiedSeconds.
const cutSQL = `
INSERT INTO {schema}outbox_batches (batch_id, event_ids, event_count, byte_count, token, attempts, next_attempt_at)
SELECT $1::uuid, ids, $3, $4, $1::uuid::text,
       CASE WHEN unverified THEN 1 ELSE 0 END,
       CASE WHEN unverified THEN clock_timestamp() + greatest(make_interval(secs => $5), ` + insertsEndSQL + `) ELSE '-infinity' END
FROM CAST($2 AS int8multirange) AS ids
CROSS JOIN LATERAL (SELECT lower(ids) <= (SELECT unverified_to FROM {schema}outbox_history) AS unverified) AS history`

// insertsEndSQL is the time within which the inserts of all relays end that have ever
// run. The 5 seconds are unverifiedMargin.
const insertsEndSQL = `(SELECT max(flush_timeout) + interval '5 s' FROM {schema}outbox_history)`

// awaitsInsertsSQL is true if a batch waits for inserts of a lost history, and was not
// claimed since.
const awaitsInsertsSQL = `(attempts > 0 AND last_attempt_at IS NULL)`

// moveCursorSQL ends a cut. $2 is the time of the cut, $6 the time of its last batch id,
// and $4 its highest id. Every visible event up to the id $3 is in a batch. The low
// watermark moves to $3 later, because ids commit out of order. If $4 was not drawn from
// the sequence, and is not unverified, the statement changes nothing.
const moveCursorSQL = `
UPDATE {schema}outbox_cursor
SET cuts                  = cuts + 1,
    last_cut_at           = $2,
    last_batch_at         = $6,
    high_watermark        = greatest(high_watermark, $4),
    low_watermark         = CASE WHEN $5 THEN next_low_watermark ELSE low_watermark END,
    next_low_watermark    = CASE WHEN $5 THEN $3 ELSE next_low_watermark END,
    next_low_watermark_at = CASE WHEN $5 THEN $2 ELSE next_low_watermark_at END
WHERE cuts = $1
  AND ($4 <= (SELECT unverified_to FROM {schema}outbox_history) OR coalesce($4 <= ` + sequenceValueSQL + `, true))`

// lowerWatermarkSQL makes the next cut start above $2. It also makes the low watermark
// due to move. Otherwise, in a backlog, the next cut would start where the last cut
// ended. The low watermark does not rise when it moves.
const lowerWatermarkSQL = `
UPDATE {schema}outbox_cursor
SET cuts                  = cuts + 1,
    low_watermark         = least(low_watermark, $2),
    next_low_watermark    = least(next_low_watermark, $2),
    next_low_watermark_at = 'epoch'
WHERE cuts = $1`

// The statements below find and record a change of history.
const (
	// lockHistorySQL allows one transaction at a time to change outbox_history. A row lock
	// would not be enough: recordHistorySQL reads the events before it waits for a row
	// lock.
	lockHistorySQL = `LOCK TABLE {schema}outbox_history IN SHARE ROW EXCLUSIVE MODE`

	// awaitCursorSQL waits for the end of a cut.
	awaitCursorSQL = `SELECT cuts FROM {schema}outbox_cursor ORDER BY cuts DESC LIMIT 1 FOR UPDATE`

	// historySQL compares outbox_history with the server and with the incarnation $1. A
	// missing row equals nothing.
	historySQL = `
SELECT history.singleton IS NOT NULL                                                  AS exists,
       coalesce(history.xmin = history.recorded_by, false)                            AS original,
       coalesce(` + sameServerSQL + `, false)                                         AS same_server,
       coalesce({same_timeline}, false)                                               AS same_timeline,
       ` + isTimelineUnknownSQL + `                                                 AS timeline_unknown,
       coalesce(history.database_oid = ` + databaseSQL + `, false)                    AS same_database,
       coalesce(history.incarnation = $1::uuid, $1::uuid IS NULL)                     AS same_incarnation,
       coalesce($1::uuid = ANY (history.ancestors), false)                            AS later_incarnation,
       coalesce(history.incarnation, '00000000-0000-0000-0000-000000000000')          AS incarnation,
       (SELECT count(*) FROM {schema}outbox_cursor)                                   AS cursors,
       coalesce((SELECT max(cuts) FROM {schema}outbox_cursor), 0)                     AS cuts
FROM {schema}diehard_server() AS server
LEFT JOIN {schema}outbox_history AS history ON true`

	// unverifiedBatchesSQL counts an attempt for each batch that has none. A batch without
	// last_attempt_at does not match a claim of the lost history, so that claim cannot
	// become a lease.
	unverifiedBatchesSQL = `
UPDATE {schema}outbox_batches
SET attempts        = greatest(attempts, 1),
    last_attempt_at = NULL,
    next_attempt_at = clock_timestamp() + greatest(make_interval(secs => $1), ` + insertsEndSQL + `)`

	// recordHistorySQL writes the row of outbox_history, or replaces it. All events that
	// exist now may already be in the sink. $1 is the incarnation that the relay
	// remembers. The sequence may be behind the events. It also knows the ids of prepared
	// transactions. $2 is the relay's time limit of an insert in seconds.
	recordHistorySQL = `
INSERT INTO {schema}outbox_history AS history (system_identifier, timeline, database_oid, ancestors, unverified_to, flush_timeout)
SELECT server.system_identifier, server.timeline, ` + databaseSQL + `,
       array_remove(ARRAY[$1::uuid], NULL),
       greatest(0, (SELECT max(id) FROM {schema}outbox_events),
                (SELECT max(upper(event_ids)) - 1 FROM {schema}outbox_batches),
                (SELECT max(outbox_event_id) FROM {schema}outbox_dead_letters),
                ` + sequenceValueSQL + `),
       make_interval(secs => $2)
FROM {schema}diehard_server() AS server
ON CONFLICT (singleton) DO UPDATE
SET system_identifier = excluded.system_identifier,
    timeline          = excluded.timeline,
    database_oid      = excluded.database_oid,
    recorded_by       = excluded.recorded_by,
    recorded_at       = excluded.recorded_at,
    incarnation       = excluded.incarnation,
    ancestors         = (history.incarnation || excluded.ancestors || history.ancestors)[1:100],
    unverified_to     = excluded.unverified_to,
    flush_timeout     = greatest(history.flush_timeout, excluded.flush_timeout)
RETURNING incarnation, unverified_to`

	// isLongerFlushTimeoutSQL returns whether $1 seconds are longer than the time limits of
	// all relays.
	isLongerFlushTimeoutSQL = `SELECT EXISTS (SELECT FROM {schema}outbox_history WHERE flush_timeout < make_interval(secs => $1))`

	// recordedBySQL is the value of recorded_by for a change of the row that must not hide
	// that the row was copied.
	recordedBySQL = `CASE WHEN history.xmin = history.recorded_by THEN pg_current_xact_id()::xid ELSE history.recorded_by END`

	raiseFlushTimeoutSQL = `
UPDATE {schema}outbox_history AS history
SET flush_timeout = make_interval(secs => $1),
    recorded_by   = ` + recordedBySQL + `
WHERE flush_timeout < make_interval(secs => $1)`

	// isIdentityUnknownSQL returns whether outbox_history lacks an identifier that the
	// server shows.
	isIdentityUnknownSQL = `
SELECT EXISTS (
    SELECT FROM {schema}outbox_history AS history, {schema}diehard_server() AS server
    WHERE history.system_identifier = '' AND server.system_identifier != '')`

	completeIdentitySQL = `
UPDATE {schema}outbox_history AS history
SET system_identifier = server.system_identifier,
    recorded_by       = ` + recordedBySQL + `
FROM {schema}diehard_server() AS server
WHERE history.system_identifier = '' AND server.system_identifier != ''`

	// resetCursorSQL replaces all rows of the cursor by one row without watermarks. If
	// all rows are missing, the relays may remember any number of cuts. The milliseconds
	// since 1970 exceed it.
	resetCursorSQL = `
WITH removed AS (DELETE FROM {schema}outbox_cursor RETURNING cuts, last_batch_at)
INSERT INTO {schema}outbox_cursor (cuts, last_batch_at)
SELECT coalesce(max(cuts) + 1, (extract(epoch FROM clock_timestamp()) * 1000)::bigint), coalesce(max(last_batch_at), 'epoch')
FROM removed
RETURNING cuts`

	// markSubscribedSQL makes the end of the subscription a change of history, also for a
	// relay that starts later.
	markSubscribedSQL = `UPDATE {schema}outbox_history SET timeline = '' WHERE timeline != ''`

	// sequencesBehindSQL returns the sequences that will return existing ids. $1 is the
	// highest id of an event.
	sequencesBehindSQL = `
SELECT name, highest, has_sequence_privilege(name, 'UPDATE') AS may_raise
FROM (VALUES (` + sequenceSQL + `, $1::bigint),
             (pg_get_serial_sequence('{schema_literal}outbox_dead_letters', 'id'),
              (SELECT max(id) FROM {schema}outbox_dead_letters))) AS sequence (name, highest)
WHERE CASE WHEN has_sequence_privilege(name, 'USAGE, SELECT')
           THEN coalesce(pg_sequence_last_value(name::regclass), 0) < highest END`

	// raiseSequenceSQL also skips some ids, because other transactions may draw ids at the
	// same time.
	raiseSequenceSQL = `SELECT setval($1::regclass, $2::bigint + 1000)`
)

// The statements of a poll take no lock. They find rows that the hints may hide.
const (
	// lookSQL returns the cursor, and the open transactions that may hold ids. The ids of
	// outbox_events ascend if the sequence was not set back, and if no session caches
	// ids.
	lookSQL = `
SELECT cursor.cuts, cursor.low_watermark, cursor.high_watermark, cursor.last_batch_at,
       ` + sameHistorySQL + ` AS same_history,
       (SELECT blown_at FROM {schema}outbox_fuse) AS fuse_blown_at,
       (SELECT paused_at FROM {schema}outbox_pause) AS paused_at,
       (SELECT paused_by FROM {schema}outbox_pause) AS paused_by,
       ARRAY(SELECT event_type FROM {schema}outbox_quarantine) AS quarantine,
       coalesce(greatest(cursor.low_watermark, cursor.high_watermark) <= ` + sequenceValueSQL + `, true)
           AND (SELECT seqcache = 1 FROM pg_sequence WHERE seqrelid = ` + sequenceSQL + `::regclass) AS ascending,
       ARRAY(` + publishersSQL + `) AS publishers
FROM (SELECT) AS one
LEFT JOIN LATERAL (
    SELECT cuts, low_watermark, high_watermark, last_batch_at
    FROM {schema}outbox_cursor WHERE cuts >= $2 ORDER BY cuts DESC LIMIT 1
) AS cursor ON true`

	// pollSQL returns the lowest event that is not in a batch: among the ids above $1 up
	// to $2, and, with ids up to $2, among the pages from $3 to $4 of the table. It also
	// returns whether events exist above the id $2, the oldest batch, and whether a batch
	// waits longer than $5 seconds, or a quarantined batch longer than $6 seconds. Unverified
	// batches may wait longer. Without the additions of zero, PostgreSQL would read
	// the primary key instead of the pages.
	pollSQL = `
WITH cut AS (SELECT range_agg(event_ids) AS ids FROM {schema}outbox_batches)
SELECT least(
           (SELECT id FROM {schema}outbox_events
            WHERE id > $1 AND id <= $2 AND NOT coalesce((SELECT ids FROM cut) @> id, false)
            ORDER BY id LIMIT 1),
           (SELECT min(id + 0) FROM {schema}outbox_events
            WHERE ctid >= $3::tid AND ctid < $4::tid AND id + 0 <= $2 AND NOT coalesce((SELECT ids FROM cut) @> id, false))
       ) AS late_commit,
       EXISTS (SELECT FROM {schema}outbox_events WHERE id > $2) AS above,
       (SELECT batch_id FROM {schema}outbox_batches ORDER BY batch_id LIMIT 1) AS oldest_batch,
       EXISTS (SELECT FROM {schema}outbox_batches
               WHERE next_attempt_at > clock_timestamp() + greatest(` + insertsEndSQL + `,
                     make_interval(secs => CASE WHEN quarantined THEN $6::float8 ELSE $5::float8 END))) AS overlong,
       pg_relation_size('{schema_literal}outbox_events') / current_setting('block_size')::int AS pages`

	// limitWaitsSQL limits the waits of batches to $1 seconds, and of quarantined batches
	// to $2 seconds. Unverified batches may wait longer. A wait is longer if the clock was
	// set back.
	limitWaitsSQL = `
UPDATE {schema}outbox_batches
SET next_attempt_at = clock_timestamp() + greatest(` + insertsEndSQL + `,
                      make_interval(secs => CASE WHEN quarantined THEN $2::float8 ELSE $1::float8 END))
WHERE batch_id IN (
    SELECT batch_id FROM {schema}outbox_batches
    WHERE next_attempt_at > clock_timestamp() + greatest(` + insertsEndSQL + `,
          make_interval(secs => CASE WHEN quarantined THEN $2::float8 ELSE $1::float8 END))
    FOR UPDATE SKIP LOCKED
)`
)

// idlePollSQL is lookSQL and pollSQL in one statement. $1 and $2 are the parameters of
// lookSQL, and $3 to $8 those of pollSQL.
var idlePollSQL = "SELECT * FROM (" + lookSQL + "\n) AS look\nCROSS JOIN (" +
	strings.NewReplacer("$1", "$3", "$2", "$4", "$3", "$5", "$4", "$6", "$5", "$7", "$6", "$8").Replace(pollSQL) + "\n) AS seen"

// The mark of a claim is attempts and last_attempt_at together. After a failover that
// lost earlier marks, the same number of attempts can occur again.

// claimSQL counts one more attempt of the oldest batch that is due and not locked, before
// the worker inserts it. If $5 is true, failing batches come first, otherwise last. If $6
// is false, failing batches are not claimed. While the fleet is paused, no batch is claimed. The first of the failing batches is the batch
// without an attempt, or with the oldest last attempt. If the batch has more than $4 bytes,
// no other batch is claimed instead. The claimed batch is not due for one second. In this
// time the worker locks it in the lease's transaction. The statement is its own
// transaction, so it sets synchronous_commit itself.
//
// The subqueries prevent a merge join, which would read the dead versions of all batches.
//
// $7 is the destination of the sink. A batch that was attempted at another destination is
// not claimed: only that destination can tell whether the batch is present.
const claimSQL = `
WITH due AS MATERIALIZED (
    SELECT batch_id, last_attempt_at FROM {schema}outbox_batches
    WHERE batch_id >= $3 AND next_attempt_at <= clock_timestamp() AND (failures = 0 OR $6)
      AND ` + sameHistorySQL + ` AND ` + sameCutsSQL + ` AND ` + notPausedSQL + `
      AND (destination IS NULL OR $7 IN ('', destination))
    ORDER BY (failures > 0) = $5 DESC, CASE WHEN failures > 0 THEN coalesce(last_attempt_at, '-infinity') END, batch_id
    LIMIT 1
    FOR UPDATE SKIP LOCKED
)
UPDATE {schema}outbox_batches AS batch
SET attempts        = attempts + 1,
    last_attempt_at = clock_timestamp(),
    next_attempt_at = clock_timestamp() + interval '1 s',
    destination     = coalesce(destination, nullif($7, ''))
WHERE batch.batch_id = (SELECT batch_id FROM due)
  AND byte_count <= $4
  AND set_config('synchronous_commit', 'on', true) = 'on'
RETURNING batch.batch_id, event_ids, event_count, byte_count, token, attempts, failures, batch.last_attempt_at,
          clock_timestamp() AS database_time,
          coalesce(destination, '') AS destination, coalesce(last_error, '') AS last_error,
          lower(event_ids) <= (SELECT max(unverified_to) FROM {schema}outbox_history) AS unverified,
          extract(epoch FROM (SELECT max(flush_timeout) FROM {schema}outbox_history))::float8 AS flush_seconds,
          created_at, (SELECT last_attempt_at FROM due) AS previous_attempt_at`

// elsewhereSQL returns the batches that were attempted at a destination other than $1.
const elsewhereSQL = `
SELECT destination, count(*) AS batches, sum(event_count) AS events
FROM {schema}outbox_batches
WHERE batch_id >= $2 AND destination <> $1
GROUP BY destination
ORDER BY destination`

// leaseSQL locks a claimed batch for the rest of the transaction, if the row still has
// the claim's mark and the history has not changed. A failover after the claim may have
// lost the marks of other workers.
const (
	leaseSQL  = markedSQL + ` FOR UPDATE SKIP LOCKED`
	markedSQL = `
SELECT 1 FROM {schema}outbox_batches
WHERE batch_id = $3 AND token = $4 AND attempts = $5 AND last_attempt_at = $6 AND ` + sameHistorySQL + ` AND ` + sameCutsSQL

	// awaitLeaseSQL waits for the lock within the second in which the batch is not due.
	// Another claim that began before the mark was written may hold the lock. That claim
	// found the batch due and locked it. Then it reads the mark and claims the next
	// batch, but keeps the lock until it commits.
	awaitLeaseSQL = markedSQL + ` AND next_attempt_at > clock_timestamp() FOR UPDATE`
)

// membersSQL reads a batch's events range by range. If the multirange was a column,
// PostgreSQL would decompress it for each row. A single range from the first to the last
// id would include late commits of other batches.
const membersSQL = `unnest($1::int8multirange) AS member
CROSS JOIN LATERAL (
    SELECT * FROM {schema}outbox_events
    WHERE id >= lower(member) AND id < upper(member)
    ORDER BY id
) AS event`

const (
	// readEventsSQL returns the events $1 as columns, in chunks of at most $2 ids.
	readEventsSQL = `SELECT keys, types, traceparents, environments, contexts` + chunksSQL

	// readKeysSQL does not read the contexts: PostgreSQL does not evaluate a subquery's
	// column that is not used.
	readKeysSQL = `SELECT keys, types, traceparents` + chunksSQL

	// chunksSQL has the format of chunk. A row is a chunk of events, because each row
	// costs the server, the driver and database/sql more than its values.
	//
	// The statement does not order a chunk's events, because PostgreSQL would copy each
	// row out of its page first. The primary key usually returns them in order.
	// PostgreSQL keeps eight kilobytes for the evaluation of a row, and each send
	// function takes one of them. An eighth function would allocate memory for each
	// event. The event type needs no send function, because it contains no slash.
	chunksSQL = `
FROM unnest($1::int8multirange) AS member
CROSS JOIN LATERAL generate_series(lower(member), upper(member) - 1, $2::bigint) AS first
CROSS JOIN LATERAL (
    SELECT string_agg(int8send(id) || uuid_send(event_id) || timestamptz_send(event_date_time) ||
                      timestamptz_send(published_at) || int8send(metadata_version), '') AS keys,
           string_agg(event_type, '/') AS types,
           string_agg(int8send(id) || textsend(traceparent), ` + nul + `)
               FILTER (WHERE traceparent IS NOT NULL) AS traceparents,
           string_agg(textsend(environment), ` + nul + `) AS environments,
           string_agg(json_send(event_context), ` + nul + `) AS contexts
    FROM {schema}outbox_events
    WHERE id >= first AND id < least(first + $2::bigint, upper(member))
) AS chunk
WHERE keys IS NOT NULL`

	deleteEventsSQL = `
DELETE FROM {schema}outbox_events
USING unnest($1::int8multirange) AS member
WHERE id >= lower(member) AND id < upper(member)`

	deleteBatchSQL = `DELETE FROM {schema}outbox_batches WHERE batch_id = $1`

	failingSQL = `SELECT count(*) FROM {schema}outbox_batches WHERE failures > 0`

	// insertBatchSQL writes a failing batch of the events $1. No other batch may contain
	// these events. If $6 is true, the batch is in quarantine. It collects events until it
	// is due, so the number of batches grows slowly.
	insertBatchSQL = `
INSERT INTO {schema}outbox_batches (batch_id, event_ids, event_count, byte_count, token, failures, last_error, quarantined, next_attempt_at)
SELECT $2::uuid, $1::int8multirange, count(*), sum(context_bytes + ` + eventOverheadSQL + `), $2::uuid::text, 1, $5, $6::boolean,
       CASE WHEN $6 THEN ` + quarantineEndSQL + ` ELSE '-infinity' END
FROM ` + membersSQL + `
RETURNING event_count`

	// quarantineEndSQL is the end of the wait of the quarantined batch $2: $3 seconds for
	// each quarantined batch that was attempted and for itself, up to $4 seconds. So one of
	// these batches is attempted about every $3 seconds.
	quarantineEndSQL = `clock_timestamp() + make_interval(secs => least($4::float8, $3::float8 * (
           SELECT 1 + count(*) FROM {schema}outbox_batches WHERE quarantined AND attempts > 0 AND batch_id <> $2
       )))`

	// collectSQL adds the events $1 to a quarantined batch that was never attempted and
	// remains within $2 events and $3 bytes.
	collectSQL = `
UPDATE {schema}outbox_batches AS batch
SET event_ids   = event_ids + $1::int8multirange,
    event_count = event_count + added.events,
    byte_count  = byte_count + added.bytes
FROM (
    SELECT count(*) AS events, sum(context_bytes + ` + eventOverheadSQL + `)::bigint AS bytes
    FROM ` + membersSQL + `
) AS added
WHERE batch_id = (
    SELECT batch_id FROM {schema}outbox_batches
    WHERE quarantined AND attempts = 0 AND event_count + added.events <= $2 AND byte_count + added.bytes <= $3
    ORDER BY batch_id DESC LIMIT 1
    FOR UPDATE SKIP LOCKED
)
RETURNING added.events`

	// holdSQL puts the attempted batch $2 into quarantine.
	holdSQL = `
UPDATE {schema}outbox_batches
SET quarantined = true, last_error = $1, next_attempt_at = ` + quarantineEndSQL + `
WHERE batch_id = $2`

	quarantineSQL = `
INSERT INTO {schema}outbox_quarantine (event_type, error) VALUES ($1, $2) ON CONFLICT DO NOTHING`

	// releaseSQL ends the quarantine of the types $1, and makes the collected batches due.
	releaseSQL = `
WITH released AS (
    DELETE FROM {schema}outbox_quarantine WHERE event_type = ANY($1::text[]) RETURNING event_type
),
due AS (
    UPDATE {schema}outbox_batches
    SET quarantined = false, next_attempt_at = CASE WHEN ` + awaitsInsertsSQL + ` THEN next_attempt_at ELSE '-infinity' END
    WHERE EXISTS (SELECT FROM released)
      AND batch_id IN (SELECT batch_id FROM {schema}outbox_batches WHERE quarantined FOR UPDATE SKIP LOCKED)
)
SELECT count(*) FROM released`

	// shrinkBatchSQL keeps only the events $1 in the batch, and makes it due. If $3 is
	// true, the batch is failing from then on. $4 is the number of attempts that no longer
	// count, because they have sent nothing. $5 is the cause, or empty.
	shrinkBatchSQL = `
UPDATE {schema}outbox_batches
SET event_ids       = $1::int8multirange,
    event_count     = remaining.events,
    byte_count      = remaining.bytes,
    failures        = CASE WHEN $3::boolean THEN greatest(failures, 1) ELSE failures END,
    attempts        = attempts - $4::int,
    last_error      = coalesce(nullif($5, ''), last_error),
    next_attempt_at = '-infinity'
FROM (
    SELECT count(*) AS events, sum(context_bytes + ` + eventOverheadSQL + `) AS bytes
    FROM ` + membersSQL + `
) AS remaining
WHERE batch_id = $2
RETURNING event_count`

	insertDeadLettersSQL = `
INSERT INTO {schema}outbox_dead_letters
    (outbox_event_id, event_id, event_type, event_date_time, environment, event_context,
     metadata_version, traceparent, published_at, batch_id, error, token, destination)
SELECT id, event_id, event_type, event_date_time, environment, event_context,
       metadata_version, traceparent, published_at, $3, error, $4, nullif($5, '')
FROM unnest($1::bigint[], $2::text[]) AS refused (id, error)
JOIN {schema}outbox_events USING (id)
ORDER BY id`

	// retryBatchSQL releases a batch. $5 is the time of the last attempt that may have
	// inserted, or null if this attempt may have. The number of attempts stays, so an
	// earlier claim cannot become a lease.
	retryBatchSQL = `
UPDATE {schema}outbox_batches
SET last_error      = $2,
    next_attempt_at = clock_timestamp() + make_interval(secs => $3),
    failures        = failures + $4,
    last_attempt_at = coalesce($5, last_attempt_at)
WHERE batch_id = $1`

	renewTokenSQL = `
UPDATE {schema}outbox_batches
SET token = $2, attempts = 0, last_error = $3, next_attempt_at = '-infinity'
WHERE batch_id = $1`
)

// deadLetterFilterSQL is the condition of a DeadLetterFilter. PostgreSQL plans the
// statement with its parameters, so null parameters cost nothing, and ids use the primary
// key. All other parameters cause a scan of the table, but the scan does not read the
// contexts.
const deadLetterFilterSQL = `
    ($1::text IS NULL OR event_type = $1)
AND ($2::text IS NULL OR environment = $2)
AND ($3::bigint[] IS NULL OR id = ANY($3))
AND ($4::uuid[] IS NULL OR event_id = ANY($4))
AND ($5::uuid IS NULL OR batch_id = $5)
AND ($6::timestamptz IS NULL OR dead_lettered_at >= $6)
AND ($7::timestamptz IS NULL OR dead_lettered_at < $7)
AND ($8::text IS NULL OR strpos(error, $8) > 0)
AND ($9::bigint IS NULL OR id < $9)`

// The statements of the fuse. It counts dead letters per hour.
const (
	fuseExpiredSQL = `fuse.since NOT BETWEEN excluded.since - interval '1 hour' AND excluded.since`

	// fuseSQL adds $1 dead letters to the fuse. The bound of an hour is $3, or a hundredth
	// of the events that were cut in the hour. $2 is the hint of the cursor. The statement
	// adds nothing and returns no row if the fuse has blown, or if the number would exceed
	// the bound.
	fuseSQL = `
INSERT INTO {schema}outbox_fuse AS fuse (since, dead_letters, high_watermark)
SELECT clock_timestamp(), $1::bigint,
       coalesce((SELECT high_watermark FROM {schema}outbox_cursor WHERE cuts >= $2 ORDER BY cuts DESC LIMIT 1), 0)
WHERE $1 <= $3 OR EXISTS (SELECT FROM {schema}outbox_fuse)
ON CONFLICT (singleton) DO UPDATE
SET since          = CASE WHEN ` + fuseExpiredSQL + ` THEN excluded.since ELSE fuse.since END,
    high_watermark = CASE WHEN ` + fuseExpiredSQL + ` THEN excluded.high_watermark ELSE fuse.high_watermark END,
    dead_letters   = excluded.dead_letters + CASE WHEN ` + fuseExpiredSQL + ` THEN 0 ELSE fuse.dead_letters END
WHERE fuse.blown_at IS NULL
  AND excluded.dead_letters + CASE WHEN ` + fuseExpiredSQL + ` THEN 0 ELSE fuse.dead_letters END <=
      greatest($3::bigint, CASE WHEN ` + fuseExpiredSQL + ` THEN 0 ELSE (excluded.high_watermark - fuse.high_watermark) / 100 END)
RETURNING dead_letters`

	blowFuseSQL = `
INSERT INTO {schema}outbox_fuse AS fuse (since, dead_letters, high_watermark, blown_at)
VALUES (clock_timestamp(), 0, 0, clock_timestamp())
ON CONFLICT (singleton) DO UPDATE SET blown_at = coalesce(fuse.blown_at, excluded.blown_at)`

	// mendFuseSQL also ends the waits of failing batches.
	mendFuseSQL = `
WITH due AS (
    UPDATE {schema}outbox_batches SET next_attempt_at = '-infinity'
    WHERE batch_id IN (SELECT batch_id FROM {schema}outbox_batches
                       WHERE failures > 0 AND NOT ` + awaitsInsertsSQL + ` FOR UPDATE SKIP LOCKED)
),
mended AS (
    UPDATE {schema}outbox_fuse
    SET since = clock_timestamp(), dead_letters = 0, blown_at = NULL,
        high_watermark = coalesce((SELECT max(high_watermark) FROM {schema}outbox_cursor), 0)
    WHERE blown_at IS NOT NULL
    RETURNING singleton
)
` + auditSQL + ` FROM mended`
)

const deadLetterColumns = `id, outbox_event_id, event_id, event_type, event_date_time, environment,
       metadata_version, coalesce(traceparent, '') AS traceparent, published_at, batch_id, error, dead_lettered_at`

const (
	listDeadLettersSQL = `
SELECT ` + deadLetterColumns + `
FROM {schema}outbox_dead_letters
WHERE ` + deadLetterFilterSQL + `
ORDER BY id DESC
LIMIT $10`

	countDeadLettersSQL = `SELECT count(*) FROM {schema}outbox_dead_letters WHERE ` + deadLetterFilterSQL

	deadLetterIDsSQL = `SELECT id FROM {schema}outbox_dead_letters WHERE ` + deadLetterFilterSQL + ` ORDER BY id`

	readDeadLetterSQL = `SELECT ` + deadLetterColumns + `, event_context FROM {schema}outbox_dead_letters WHERE id = $1`

	// requeueDeadLettersSQL moves events back into outbox_events. The new ids ascend in the
	// order of the letters, so the n-th id belongs to the n-th letter. A second statement
	// for the same letters waits for the first and then finds no letters. Both statements
	// lock the letters in the order of the primary key.
	requeueDeadLettersSQL = `
WITH requeued AS (
    DELETE FROM {schema}outbox_dead_letters WHERE id = ANY($1::bigint[]) RETURNING *
),
published AS (
    INSERT INTO {schema}outbox_events
        (event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent, published_at)
    SELECT event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent, published_at
    FROM requeued
    ORDER BY id
    RETURNING id, event_id, context_bytes
)
SELECT letter.id, letter.event_type, letter.event_id, letter.token, letter.destination, letter.outbox_event_id,
       letter.dead_lettered_at, event.id AS new_id, event.context_bytes + ` + eventOverheadSQL + ` AS bytes
FROM (SELECT id, event_type, event_id, token, coalesce(destination, '') AS destination, outbox_event_id, dead_lettered_at,
             row_number() OVER (ORDER BY id) AS n FROM requeued) AS letter
LEFT JOIN (SELECT id, event_id, context_bytes, row_number() OVER (ORDER BY id) AS n FROM published) AS event USING (n, event_id)
ORDER BY letter.id`

	// lockCursorToRequeueSQL waits for the lock of the fleet. It limits the time for which
	// a suspended process holds the lock.
	lockCursorToRequeueSQL = `
SELECT cuts, greatest(clock_timestamp(), last_batch_at + interval '1 ms') AS batch_at,
       set_config('idle_in_transaction_session_timeout', '10s', true)     AS ignored
FROM {schema}outbox_cursor
ORDER BY cuts DESC
LIMIT 1
FOR UPDATE`

	countBatchesSQL = `SELECT count(*) FROM {schema}outbox_batches`

	// requeueBatchesSQL writes batches as columns. Each batch counts one attempt, so the
	// next claim resolves it. last_attempt_at is the time of the first dead letter: before
	// that time, the events were absent. If the history has changed since an event was
	// published ($8 is the lowest id that the events had), the event may have been requeued
	// before under a token that is lost. The batch then waits as in cutSQL.
	requeueBatchesSQL = `
INSERT INTO {schema}outbox_batches
    (batch_id, event_ids, event_count, byte_count, token, destination, attempts, last_attempt_at, next_attempt_at)
SELECT batch_id, event_ids, event_count, byte_count, token, nullif(destination, ''), 1,
       CASE WHEN NOT unverified THEN last_attempt_at END,
       CASE WHEN unverified THEN clock_timestamp() + greatest(make_interval(secs => $9), ` + insertsEndSQL + `) ELSE '-infinity' END
FROM unnest($1::uuid[], $2::int8multirange[], $3::int[], $4::bigint[], $5::text[], $6::text[], $7::timestamptz[], $8::bigint[])
    AS batch (batch_id, event_ids, event_count, byte_count, token, destination, last_attempt_at, first_old)
CROSS JOIN LATERAL (SELECT coalesce(first_old <= (SELECT max(unverified_to) FROM {schema}outbox_history), false) AS unverified) AS history`

	// requeuedSQL moves the cursor past the last batch id $2. The first cut of an outbox
	// must still find zero cuts, because isForeignSQL then finds the batches.
	requeuedSQL = `
UPDATE {schema}outbox_cursor
SET cuts          = CASE WHEN cuts = 0 THEN 0 ELSE cuts + 1 END,
    last_batch_at = $2
WHERE cuts = $1`

	discardDeadLettersSQL = `
WITH discarded AS (
    DELETE FROM {schema}outbox_dead_letters WHERE id = ANY($1::bigint[]) RETURNING id, event_type, event_id
)
SELECT id, event_type, event_id FROM discarded ORDER BY id`
)

// The cost of statsSQL does not depend on the size of the table. It counts the events
// above the high watermark that are not in a batch, up to exactBacklog. Requeued events are
// above it and in a batch. If the cursor is missing, the high watermark is 0. It counts
// dead letters up to a bound as well, and the types of the newest of them. A batch of an
// event that was deleted by hand has the time at which it was written.
const statsSQL = `
WITH cursor AS (
    SELECT coalesce((SELECT high_watermark FROM {schema}outbox_cursor WHERE cuts >= $1 ORDER BY cuts DESC LIMIT 1), 0) AS high_watermark
),
uncut AS (
    SELECT count(*) AS events, min(published_at) AS oldest
    FROM (
        SELECT published_at FROM {schema}outbox_events
        WHERE id > (SELECT high_watermark FROM cursor)
          AND NOT coalesce((SELECT range_agg(event_ids) FROM {schema}outbox_batches
                            WHERE upper(event_ids) - 1 > (SELECT high_watermark FROM cursor)) @> id, false)
        ORDER BY id LIMIT $2
    ) AS counted
),
batch AS (
    SELECT ` + batchStateSQL + ` AS state, failures, event_count, coalesce(first.published_at, created_at) AS oldest
    FROM {schema}outbox_batches AS batch
    LEFT JOIN LATERAL (
        SELECT published_at FROM {schema}outbox_events WHERE id = lower(batch.event_ids)
    ) AS first ON true
),
by_state AS (
    SELECT state, count(*) AS batches, sum(event_count) AS events,
           greatest(extract(epoch FROM clock_timestamp() - min(oldest)), 0)::float8 AS oldest_seconds
    FROM batch GROUP BY state
),
dead_letter AS (SELECT event_type FROM {schema}outbox_dead_letters ORDER BY id DESC LIMIT 1000)
SELECT coalesce((SELECT jsonb_object_agg(state, to_jsonb(by_state)) FROM by_state), '{}') AS batches,
       (SELECT count(*) FROM batch WHERE failures > 0)             AS failing_batches,
       coalesce((SELECT sum(event_count) FROM batch), 0)           AS batch_events,
       uncut.events                                                AS uncut_events,
       (SELECT high_watermark FROM cursor)                         AS high_watermark,
       coalesce((SELECT id FROM {schema}outbox_events ORDER BY id DESC LIMIT 1), 0) AS highest_id,
       greatest(extract(epoch FROM clock_timestamp() - least(uncut.oldest, (SELECT min(oldest) FROM batch))), 0) AS oldest_seconds,
       (SELECT count(*) FROM (SELECT FROM {schema}outbox_dead_letters LIMIT 10000) AS counted) AS dead_letters,
       coalesce((SELECT jsonb_object_agg(event_type, events) FROM (
           SELECT event_type, count(*) AS events FROM dead_letter GROUP BY event_type ORDER BY 2 DESC LIMIT 20
       ) AS by_type), '{}')                                        AS dead_letter_types,
       {schema}diehard_backlog_bytes()                             AS backlog_bytes,
       coalesce(least((SELECT min(lower(event_ids)) FROM {schema}outbox_batches),
                      CASE WHEN uncut.events > 0 THEN (SELECT high_watermark FROM cursor) + 1 END) <=
                (SELECT max(unverified_to) FROM {schema}outbox_history), false) AS unverified,
       pg_table_size('{schema_literal}outbox_events') + pg_indexes_size('{schema_literal}outbox_events') AS size_bytes
FROM uncut`

// countUncutSQL counts the events above the id $1 that are not in a batch, in chunks of $2
// events, up to $3 events. A chunk has the highest of its ids.
const countUncutSQL = `
WITH batch AS MATERIALIZED (
    SELECT coalesce(range_agg(event_ids), '{}') AS ids FROM {schema}outbox_batches WHERE upper(event_ids) - 1 > $1
)
SELECT max(id) AS upper, count(*) AS events
FROM (
    SELECT id, (row_number() OVER (ORDER BY id) - 1) / $2 AS chunk
    FROM {schema}outbox_events
    WHERE id > $1 AND NOT (SELECT ids FROM batch) @> id
    ORDER BY id LIMIT $3
) AS event
GROUP BY chunk
ORDER BY chunk`

// countBetweenSQL counts the events above the id $1 and up to $2 that are not in a batch.
const countBetweenSQL = `
SELECT count(*) FROM {schema}outbox_events
WHERE id > $1 AND id <= $2
  AND NOT coalesce((SELECT range_agg(event_ids) FROM {schema}outbox_batches WHERE upper(event_ids) - 1 > $1) @> id, false)`

// nul is the separator of texts. It does not depend on standard_conforming_strings.
const nul = `decode('00', 'hex')`

// eventOverhead is the number of bytes that an event adds to a batch in addition to its
// context.
const (
	eventOverhead    = 128
	eventOverheadSQL = `128`
)
