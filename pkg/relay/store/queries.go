package store

// All of the store's SQL. It is written for the session settings of Session:
// without sequential scans and just-in-time compilation the plans do not depend
// on statistics, which always lag behind a table that turns over completely.

// lockCursorSQL takes the fleet's lock for a cut, or returns nothing where
// another process has it. The order and the lower bound make it meet the live
// version of the row first, however many dead ones an old transaction keeps.
// set_config bounds how long a process that is stopped here (SIGSTOP, a lost
// network) holds the others up.
const lockCursorSQL = `
SELECT cuts, low_watermark, next_low_watermark, high_watermark,
       extract(epoch FROM clock_timestamp() - last_cut_at)     AS since_cut,
       extract(epoch FROM clock_timestamp() - next_low_watermark_at)   AS since_watermark,
       greatest(clock_timestamp(), last_cut_at + interval '1 ms') AS cut_at,
       set_config('idle_in_transaction_session_timeout', '10s', true) AS ignored
FROM {schema}outbox_cursor
WHERE cuts >= $1
ORDER BY cuts DESC
LIMIT 1
FOR UPDATE SKIP LOCKED`

// cursorThereSQL tells whether the cursor has the key $1 or a later one.
const cursorThereSQL = `SELECT EXISTS (SELECT FROM {schema}outbox_cursor WHERE cuts >= $1)`

// waitingSQL counts the manifests and tells whether this is still the
// PostgreSQL history that they were written in. Those that are parts of a batch
// that was refused do not count as unsent: they are many, and small.
const waitingSQL = `
SELECT (SELECT count(*) FROM {schema}outbox_batches WHERE batch_id >= $1) AS manifests,
       (SELECT count(*) FROM {schema}outbox_batches
        WHERE batch_id >= $1 AND attempts = 0 AND last_error IS NULL) AS unsent,
       ` + sameHistorySQL + ` AS same_history`

// sameHistorySQL is true while the server's identity and timeline are those
// that outbox_history names.
const sameHistorySQL = `EXISTS (
    SELECT FROM {schema}outbox_history, pg_control_system() AS server
    WHERE {schema}outbox_history.system_identifier = server.system_identifier::text
      AND {schema}outbox_history.timeline = substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)
)`

// uncutSQL packs the ids of the first $3 events above $2 that are in no manifest,
// each with its bytes in a batch, into one value, as readUncut knows it: to put
// them into batches here would take the server several times as long as to find
// them. They come from the primary key, gap by gap between the manifests, and so in
// its order; what is in a manifest is not looked at.
const uncutSQL = `
WITH gap AS (
    SELECT unnest(int8multirange(int8range($2, NULL, '()')) - coalesce(range_agg(event_ids), '{}')) AS ids
    FROM {schema}outbox_batches
    WHERE batch_id >= $1
)
SELECT coalesce(string_agg(int8send(id) || int4send(context_bytes + ` + eventOverhead + `), ''), '')
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

// cutSQL writes the manifest $1 of the events $2, which are $3 and have $4 bytes.
// An event that was there when the history changed may have been sent, and under a
// token that nobody knows any more: an insert that is still running cannot be found
// by it, but ends within $5 seconds.
const cutSQL = `
INSERT INTO {schema}outbox_batches (batch_id, event_ids, event_count, byte_count, token, attempts, next_attempt_at)
SELECT $1::uuid, ids, $3, $4, $1::uuid::text,
       CASE WHEN suspect THEN 1 ELSE 0 END,
       CASE WHEN suspect THEN clock_timestamp() + make_interval(secs => $5) ELSE '-infinity' END
FROM CAST($2 AS int8multirange) AS ids
CROSS JOIN LATERAL (SELECT lower(ids) <= (SELECT max(unverified_to) FROM {schema}outbox_history) AS suspect) AS history`

// moveCursorSQL ends a cut: $2 is its time, $3 an id up to which every visible
// event is in a manifest, $4 the highest id it took. The floor follows only
// when it has been the floor-to-be for a while, for ids commit out of order.
const moveCursorSQL = `
UPDATE {schema}outbox_cursor
SET cuts          = cuts + 1,
    last_cut_at   = $2,
    high_watermark        = greatest(high_watermark, $4),
    low_watermark         = CASE WHEN $5 THEN next_low_watermark ELSE low_watermark END,
    next_low_watermark    = CASE WHEN $5 THEN $3 ELSE next_low_watermark END,
    next_low_watermark_at = CASE WHEN $5 THEN $2 ELSE next_low_watermark_at END
WHERE cuts = $1`

// lowerWatermarkSQL makes the next cuts look from below $2 again. The floor is due to
// move, or in a backlog they would go on where the last one has ended; it does not
// rise by that, for the floor-to-be is as low.
const lowerWatermarkSQL = `
UPDATE {schema}outbox_cursor
SET cuts          = cuts + 1,
    low_watermark         = least(low_watermark, $2),
    next_low_watermark    = least(next_low_watermark, $2),
    next_low_watermark_at = 'epoch'
WHERE cuts = $1`

// unverifiedBatchesSQL and recordHistorySQL record a change of history: whatever
// is there now may have been sent, and is asked for before it is sent. Without
// last_attempt_at, no claim of the lost history becomes a lease.
const (
	unverifiedBatchesSQL = `
UPDATE {schema}outbox_batches
SET attempts           = greatest(attempts, 1),
    last_attempt_at    = NULL,
    next_attempt_at = greatest(next_attempt_at, clock_timestamp() + make_interval(secs => $1))`
	recordHistorySQL = `
UPDATE {schema}outbox_history
SET system_identifier = server.system_identifier::text,
    timeline          = substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8),
    unverified_to        = coalesce(pg_sequence_last_value(pg_get_serial_sequence('{schema_literal}outbox_events', 'id')), 0)
FROM pg_control_system() AS server`
)

// pollSQL finds, outside of any lock, what the hints may hide: an event at or
// below the floor $1 that no manifest has, and the oldest manifest, or what all
// that come are younger than; and whether there is anything to do at all.
const pollSQL = `
WITH taken AS (SELECT range_agg(event_ids) AS ids FROM {schema}outbox_batches)
SELECT coalesce((
           SELECT id FROM {schema}outbox_events
           WHERE id <= $1 AND NOT coalesce((SELECT ids FROM taken) @> id, false)
           ORDER BY id LIMIT 1
       ), 0) AS late_commit,
       EXISTS (SELECT FROM {schema}outbox_events WHERE id > $1) AS above_floor,
       (SELECT batch_id FROM {schema}outbox_batches ORDER BY batch_id LIMIT 1) AS oldest_batch,
       (SELECT last_cut_at FROM {schema}outbox_cursor WHERE cuts >= $2 ORDER BY cuts DESC LIMIT 1) AS last_cut_at`

// A mark is a claim's: sends and last_attempt_at together. The number alone would
// come again after a failover that lost the marks before.

// claimSQL marks the oldest batch that is due and not locked as sent once
// more, before anything is sent. If $3, one that has failed goes before those
// that have not, and otherwise after them. It skips nobody: where that batch has
// more than $2 bytes, nothing is claimed. The second that the batch is not due
// again covers the gap until its claimer has locked it for good.
const claimSQL = `
UPDATE {schema}outbox_batches
SET attempts           = attempts + 1,
    last_attempt_at    = clock_timestamp(),
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

// leaseSQL holds a claimed batch for the rest of the transaction, if the claim's
// mark is still the last one, and of this PostgreSQL history: a failover between
// the two may have lost marks that others have sent after.
const (
	leaseSQL  = markedSQL + ` FOR UPDATE SKIP LOCKED`
	markedSQL = `
SELECT 1 FROM {schema}outbox_batches
WHERE batch_id = $1 AND token = $2 AND attempts = $3 AND last_attempt_at = $4 AND ` + sameHistorySQL

	// awaitLeaseSQL waits for the batch within the second that the claim has kept it
	// from the others for. Whoever has it locked then claims something else: a claim
	// that has begun before the mark finds the batch due, locks it, sees the mark
	// only now and goes on to the next batch, but lets go when it commits.
	awaitLeaseSQL = markedSQL + ` AND next_attempt_at > clock_timestamp() FOR UPDATE`
)

// membersSQL is the way to a batch's events: by its ranges, never by the
// multirange as a column (it would be decompressed for each row) and never by
// a bare range of ids (ids commit out of order).
const membersSQL = `unnest($1::int8multirange) AS member
CROSS JOIN LATERAL (
    SELECT * FROM {schema}outbox_events
    WHERE id >= lower(member) AND id < upper(member)
    ORDER BY id
) AS event`

const (
	// readEventsSQL returns the events $1 in chunks of at most $2 ids, by columns: a
	// row costs the server, the driver and database/sql more than what is in it, and
	// a value within it more than one at the end of many. chunk tells the form.
	//
	// A chunk's events are not put in order here, though the primary key leads to them
	// in that of their ids: to order them, PostgreSQL would copy each row out of its
	// page first. And the type, which holds no slash, makes one text with the
	// environment: each send function takes a kilobyte of the eight that PostgreSQL
	// keeps for what it works out of a row, and the eighth function has it get more
	// from the system and give it back, event by event.
	readEventsSQL = `
SELECT keys, kinds, traceparents, contexts
FROM unnest($1::int8multirange) AS member
CROSS JOIN LATERAL generate_series(lower(member), upper(member) - 1, $2::bigint) AS first
CROSS JOIN LATERAL (
    SELECT string_agg(int8send(id) || uuid_send(event_id) || timestamptz_send(event_date_time) ||
                      timestamptz_send(published_at) || int8send(metadata_version), '') AS keys,
           string_agg(textsend(event_type || '/' || environment), ` + nul + `) AS kinds,
           string_agg(int8send(id) || textsend(traceparent), ` + nul + `)
               FILTER (WHERE traceparent IS NOT NULL) AS traceparents,
           string_agg(json_send(event_context), ` + nul + `) AS contexts
    FROM {schema}outbox_events
    WHERE id >= first AND id < least(first + $2::bigint, upper(member))
) AS chunk
WHERE keys IS NOT NULL`

	// Integers instead of timestamps: their text costs more to make and to
	// read than all of the other columns together.
	readKeysSQL = `
SELECT id, event_id, event_type, (extract(epoch FROM event_date_time) * 1000000)::bigint,
       coalesce(traceparent, ''), (extract(epoch FROM published_at) * 1000000)::bigint
FROM ` + membersSQL

	deleteEventsSQL = `
DELETE FROM {schema}outbox_events
USING unnest($1::int8multirange) AS member
WHERE id >= lower(member) AND id < upper(member)`

	deleteBatchSQL = `DELETE FROM {schema}outbox_batches WHERE batch_id = $1`

	// insertBatchSQL writes a manifest of the events $1, which are in no other.
	insertBatchSQL = `
INSERT INTO {schema}outbox_batches (batch_id, event_ids, event_count, byte_count, token, last_error)
SELECT $2::uuid, $1::int8multirange, count(*), sum(context_bytes + ` + eventOverhead + `), $2::uuid::text, $3
FROM ` + membersSQL + `
RETURNING event_count`

	// shrinkBatchSQL leaves the events $1 in the manifest, to be resolved at once.
	shrinkBatchSQL = `
UPDATE {schema}outbox_batches
SET event_ids       = $1::int8multirange,
    event_count     = rest.events,
    byte_count      = rest.bytes,
    next_attempt_at = '-infinity'
FROM (
    SELECT count(*) AS events, sum(context_bytes + ` + eventOverhead + `) AS bytes
    FROM ` + membersSQL + `
) AS rest
WHERE batch_id = $2
RETURNING event_count`

	insertDeadLettersSQL = `
INSERT INTO {schema}outbox_dead_letters
    (outbox_event_id, event_id, event_type, event_date_time, environment, event_context,
     metadata_version, traceparent, published_at, batch_id, error)
SELECT id, event_id, event_type, event_date_time, environment, event_context,
       metadata_version, traceparent, published_at, $3, error
FROM unnest($1::bigint[], $2::text[]) AS dead (id, error)
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

// deadLetterFilterSQL is a DeadLetterFilter. Its parameters are known when a
// statement is planned, so that what is null costs nothing and ids are looked
// up in the primary key. Everything else reads the table, but not the contexts.
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

	// requeueDeadLettersSQL moves the events back. Of two that do so at once, the
	// second waits for the first and then finds nothing: the letters are locked
	// in the order of the primary key, by which they are looked up.
	requeueDeadLettersSQL = `
WITH retried AS (
    DELETE FROM {schema}outbox_dead_letters WHERE id = ANY($1::bigint[]) RETURNING *
),
published AS (
    INSERT INTO {schema}outbox_events
        (event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent, published_at)
    SELECT event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent, published_at
    FROM retried
    ORDER BY id
    RETURNING id
)
SELECT id, event_type, event_id,
       min(outbox_event_id) OVER () AS first_old,
       (SELECT max(id) FROM published) AS last_new
FROM retried
ORDER BY id`

	// lockHistorySQL makes unverifiedRequeuedSQL and recordHistorySQL follow each
	// other. A row's lock would not do: the latter reads the highest id that was
	// given out before it waits for one.
	lockHistorySQL = `LOCK TABLE {schema}outbox_history IN SHARE ROW EXCLUSIVE MODE`

	unverifiedRequeuedSQL = `
UPDATE {schema}outbox_history SET unverified_to = greatest(unverified_to, $2) WHERE unverified_to >= $1`

	discardDeadLettersSQL = `
WITH discarded AS (
    DELETE FROM {schema}outbox_dead_letters WHERE id = ANY($1::bigint[]) RETURNING id, event_type, event_id
)
SELECT id, event_type, event_id FROM discarded ORDER BY id`
)

// statsSQL costs the same however large the table is. Above the highest id
// that was ever cut, the events are counted up to a bound and estimated by the
// sequence beyond it (too high then, by the ids of rolled-back transactions).
// Dead letters are counted up to a bound, too.
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

// nul is the byte that parts texts, whatever the server takes a backslash for.
const nul = `decode('00', 'hex')`

// eventOverhead is what a row counts in a batch's bytes beside its context.
const eventOverhead = `128`
