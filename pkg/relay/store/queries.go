package store

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
       greatest(clock_timestamp(), last_cut_at + interval '1 ms')    AS cut_at,
       set_config('idle_in_transaction_session_timeout', '10s', true) AS ignored
FROM {schema}outbox_cursor
WHERE cuts >= $1
ORDER BY cuts DESC
LIMIT 1
FOR UPDATE SKIP LOCKED`

// cursorExistsSQL returns whether the cursor has the key $1 or a later key.
const cursorExistsSQL = `SELECT EXISTS (SELECT FROM {schema}outbox_cursor WHERE cuts >= $1)`

// waitingSQL counts the batches, and returns whether they belong to the current history
// of PostgreSQL. Batches that come from splits do not count as unattempted, because they
// are many and small.
const waitingSQL = `
SELECT (SELECT count(*) FROM {schema}outbox_batches WHERE batch_id >= $1) AS batches,
       (SELECT count(*) FROM {schema}outbox_batches
        WHERE batch_id >= $1 AND attempts = 0 AND last_error IS NULL) AS unattempted,
       ` + sameHistorySQL + ` AS same_history`

// sameHistorySQL is true if outbox_history has the server's identity and timeline.
const sameHistorySQL = `EXISTS (
    SELECT FROM {schema}outbox_history, pg_control_system() AS server
    WHERE {schema}outbox_history.system_identifier = server.system_identifier::text
      AND {schema}outbox_history.timeline = substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
)`

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
// Without the token, the relay cannot find such an insert in flight, but the insert ends
// within $5 seconds.
const cutSQL = `
INSERT INTO {schema}outbox_batches (batch_id, event_ids, event_count, byte_count, token, attempts, next_attempt_at)
SELECT $1::uuid, ids, $3, $4, $1::uuid::text,
       CASE WHEN unverified THEN 1 ELSE 0 END,
       CASE WHEN unverified THEN clock_timestamp() + make_interval(secs => $5) ELSE '-infinity' END
FROM CAST($2 AS int8multirange) AS ids
CROSS JOIN LATERAL (SELECT lower(ids) <= (SELECT max(unverified_to) FROM {schema}outbox_history) AS unverified) AS history`

// moveCursorSQL ends a cut. $2 is the time of the cut, and $4 its highest id. Every
// visible event up to the id $3 is in a batch. The low watermark moves to $3 later,
// because ids commit out of order.
const moveCursorSQL = `
UPDATE {schema}outbox_cursor
SET cuts                  = cuts + 1,
    last_cut_at           = $2,
    high_watermark        = greatest(high_watermark, $4),
    low_watermark         = CASE WHEN $5 THEN next_low_watermark ELSE low_watermark END,
    next_low_watermark    = CASE WHEN $5 THEN $3 ELSE next_low_watermark END,
    next_low_watermark_at = CASE WHEN $5 THEN $2 ELSE next_low_watermark_at END
WHERE cuts = $1`

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

// unverifiedBatchesSQL and recordHistorySQL record a change of history. All events that
// exist now may already be in the sink, so they are resolved before they are inserted. A
// batch without last_attempt_at does not match a claim of the lost history, so that claim
// cannot become a lease.
const (
	unverifiedBatchesSQL = `
UPDATE {schema}outbox_batches
SET attempts        = greatest(attempts, 1),
    last_attempt_at = NULL,
    next_attempt_at = greatest(next_attempt_at, clock_timestamp() + make_interval(secs => $1))`
	recordHistorySQL = `
UPDATE {schema}outbox_history
SET system_identifier = server.system_identifier::text,
    timeline          = substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8),
    unverified_to     = coalesce(pg_sequence_last_value(pg_get_serial_sequence('{schema_literal}outbox_events', 'id')), 0)
FROM pg_control_system() AS server`
)

// pollSQL takes no lock. It finds rows that the hints may hide: a late commit at or below
// the low watermark $1, and the oldest batch. It also returns whether events exist above
// the low watermark, and the time of the last cut, for an outbox without batches.
const pollSQL = `
WITH cut AS (SELECT range_agg(event_ids) AS ids FROM {schema}outbox_batches)
SELECT coalesce((
           SELECT id FROM {schema}outbox_events
           WHERE id <= $1 AND NOT coalesce((SELECT ids FROM cut) @> id, false)
           ORDER BY id LIMIT 1
       ), 0) AS late_commit,
       EXISTS (SELECT FROM {schema}outbox_events WHERE id > $1) AS above_low_watermark,
       (SELECT batch_id FROM {schema}outbox_batches ORDER BY batch_id LIMIT 1) AS oldest_batch,
       (SELECT last_cut_at FROM {schema}outbox_cursor WHERE cuts >= $2 ORDER BY cuts DESC LIMIT 1) AS last_cut_at`

// The mark of a claim is attempts and last_attempt_at together. After a failover that
// lost earlier marks, the same number of attempts can occur again.

// claimSQL counts one more attempt of the oldest batch that is due and not locked, before
// the worker inserts it. If $3 is true, failed batches come first, otherwise last. If the
// batch has more than $2 bytes, no other batch is claimed instead. The claimed batch is
// not due for one second. In this time the worker locks it in the lease's transaction.
const claimSQL = `
UPDATE {schema}outbox_batches
SET attempts        = attempts + 1,
    last_attempt_at = clock_timestamp(),
    next_attempt_at = clock_timestamp() + interval '1 s'
WHERE batch_id = (
    SELECT batch_id FROM {schema}outbox_batches
    WHERE batch_id >= $1 AND next_attempt_at <= clock_timestamp() AND ` + sameHistorySQL + `
    ORDER BY (last_error IS NOT NULL) = $3 DESC, batch_id
    LIMIT 1
    FOR UPDATE SKIP LOCKED
)
AND byte_count <= $2
RETURNING batch_id, event_ids, event_count, byte_count, token, attempts, last_attempt_at, clock_timestamp() AS database_time`

// leaseSQL locks a claimed batch for the rest of the transaction, if the row still has
// the claim's mark and the history has not changed. A failover after the claim may have
// lost the marks of other workers.
const (
	leaseSQL  = markedSQL + ` FOR UPDATE SKIP LOCKED`
	markedSQL = `
SELECT 1 FROM {schema}outbox_batches
WHERE batch_id = $1 AND token = $2 AND attempts = $3 AND last_attempt_at = $4 AND ` + sameHistorySQL

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

	// insertBatchSQL writes a batch of the events $1. No other batch may contain these
	// events.
	insertBatchSQL = `
INSERT INTO {schema}outbox_batches (batch_id, event_ids, event_count, byte_count, token, last_error)
SELECT $2::uuid, $1::int8multirange, count(*), sum(context_bytes + ` + eventOverheadSQL + `), $2::uuid::text, $3
FROM ` + membersSQL + `
RETURNING event_count`

	// shrinkBatchSQL keeps only the events $1 in the batch, and makes it due.
	shrinkBatchSQL = `
UPDATE {schema}outbox_batches
SET event_ids       = $1::int8multirange,
    event_count     = remaining.events,
    byte_count      = remaining.bytes,
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
     metadata_version, traceparent, published_at, batch_id, error)
SELECT id, event_id, event_type, event_date_time, environment, event_context,
       metadata_version, traceparent, published_at, $3, error
FROM unnest($1::bigint[], $2::text[]) AS refused (id, error)
JOIN {schema}outbox_events USING (id)
ORDER BY id`

	retryBatchSQL = `
UPDATE {schema}outbox_batches
SET last_error = $2, next_attempt_at = clock_timestamp() + make_interval(secs => $3)
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

	// requeueDeadLettersSQL moves events back into the outbox. A second statement for the
	// same letters waits for the first and then finds no letters. Both statements lock
	// the letters in the order of the primary key.
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
    RETURNING id
)
SELECT id, event_type, event_id,
       min(outbox_event_id) OVER () AS first_old,
       (SELECT max(id) FROM published) AS last_new
FROM requeued
ORDER BY id`

	// lockHistorySQL prevents unverifiedRequeuedSQL and recordHistorySQL from running at
	// the same time. A row lock would not be enough: recordHistorySQL reads the sequence
	// before it waits for a row lock.
	lockHistorySQL = `LOCK TABLE {schema}outbox_history IN SHARE ROW EXCLUSIVE MODE`

	unverifiedRequeuedSQL = `
UPDATE {schema}outbox_history SET unverified_to = greatest(unverified_to, $2) WHERE unverified_to >= $1`

	discardDeadLettersSQL = `
WITH discarded AS (
    DELETE FROM {schema}outbox_dead_letters WHERE id = ANY($1::bigint[]) RETURNING id, event_type, event_id
)
SELECT id, event_type, event_id FROM discarded ORDER BY id`
)

// The cost of statsSQL does not depend on the size of the table. It counts the events
// above the high watermark up to a bound. Beyond the bound it estimates the number from
// the sequence. The estimate includes the ids of rolled-back transactions. It counts dead
// letters up to a bound as well.
const statsSQL = `
WITH cursor AS (SELECT high_watermark FROM {schema}outbox_cursor WHERE cuts >= $1 ORDER BY cuts DESC LIMIT 1),
uncut AS (
    SELECT count(*) AS events, min(published_at) AS oldest
    FROM (
        SELECT published_at FROM {schema}outbox_events
        WHERE id > (SELECT high_watermark FROM cursor) ORDER BY id LIMIT 10000
    ) AS counted
),
batches AS (
    SELECT count(*) AS batches, coalesce(sum(event_count), 0) AS events, min(first.published_at) AS oldest
    FROM {schema}outbox_batches
    LEFT JOIN LATERAL (
        SELECT published_at FROM {schema}outbox_events WHERE id = lower({schema}outbox_batches.event_ids)
    ) AS first ON true
)
SELECT batches.batches,
       batches.events + CASE
           WHEN uncut.events < 10000 THEN uncut.events
           ELSE greatest(10000, pg_sequence_last_value(pg_get_serial_sequence('{schema_literal}outbox_events', 'id'))
                                - (SELECT high_watermark FROM cursor))
       END AS backlog_events,
       coalesce(extract(epoch FROM clock_timestamp() - least(uncut.oldest, batches.oldest)), 0) AS oldest_seconds,
       (SELECT count(*) FROM (SELECT FROM {schema}outbox_dead_letters LIMIT 10000) AS counted) AS dead_letters
FROM uncut, batches`

// nul is the separator of texts. It does not depend on standard_conforming_strings.
const nul = `decode('00', 'hex')`

// eventOverhead is the number of bytes that an event adds to a batch in addition to its
// context.
const (
	eventOverhead    = 128
	eventOverheadSQL = `128`
)
