-- +goose Up

-- Events that are not delivered yet. The publisher inserts a row, nobody updates it,
-- and a relay deletes it once the sink has acknowledged it. The columns are the
-- contract with publishers that write SQL. All but event_type and event_context have
-- a default.
CREATE TABLE {schema}outbox_events (
    id               bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id         uuid        NOT NULL DEFAULT gen_random_uuid()
        -- What a client sends that has made no id.
        CONSTRAINT event_id_is_not_nil CHECK (event_id <> '00000000-0000-0000-0000-000000000000'),
    event_type       text        NOT NULL
        -- A regular expression with a count ({0,127}) would take half of the time of
        -- an insert.
        CONSTRAINT event_type_is_snake_case CHECK (octet_length(event_type) <= 128 AND event_type ~ '^[a-z][a-z0-9_]*$'),
    event_date_time  timestamptz NOT NULL DEFAULT clock_timestamp()
        -- The range of RFC 3339. A time that the sink cannot hold makes the event a
        -- dead letter.
        CONSTRAINT event_date_time_is_in_years_1_to_9999
            CHECK (event_date_time >= '0001-01-01 00:00:00+00' AND event_date_time < '10000-01-01 00:00:00+00'),
    environment      text        NOT NULL DEFAULT 'Local'
        CONSTRAINT environment_is_short CHECK (octet_length(environment) BETWEEN 1 AND 128),
    -- json keeps the text byte for byte and is cheaper to write and to read than
    -- jsonb.
    event_context    json        NOT NULL,
    metadata_version bigint      NOT NULL DEFAULT 1
        CONSTRAINT metadata_version_is_not_negative CHECK (metadata_version >= 0),
    traceparent      text
        -- Four hexadecimal numbers of 2, 32, 16 and 2 digits.
        CONSTRAINT traceparent_is_w3c
            CHECK (traceparent LIKE '__-________________________________-________________-__'
               AND traceparent ~ '^[0-9a-f]*-[0-9a-f]*-[0-9a-f]*-[0-9a-f]*$'),
    published_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- pg_column_size returns the compressed size.
    context_bytes    int         NOT NULL GENERATED ALWAYS AS (octet_length(event_context::text)) STORED
        -- The upper bound of outbox.max_event_bytes: a relay holds about three times
        -- the event in memory.
        CONSTRAINT event_context_is_at_most_128_mib CHECK (context_bytes <= 134217728)
) WITH (
    -- All rows are replaced all the time: a share of them is no measure, and each cut
    -- reads dead index entries until they are vacuumed.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 50000,
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 200000
);

-- The batches: which events one insert into the sink carries, and its token. A batch
-- is committed before its first byte is sent, so that every attempt sends the same
-- rows in the same order.
CREATE TABLE {schema}outbox_batches (
    batch_id        uuid            PRIMARY KEY,
    event_ids       int8multirange  NOT NULL CHECK (NOT isempty(event_ids)),
    event_count     int             NOT NULL CHECK (event_count > 0),
    byte_count      bigint          NOT NULL,
    token           text            NOT NULL,
    -- Attempts under this token: claims that have inserted or may have inserted.
    attempts        int             NOT NULL DEFAULT 0,
    last_attempt_at timestamptz,
    next_attempt_at timestamptz     NOT NULL DEFAULT '-infinity',
    last_error      text,
    created_at      timestamptz     NOT NULL DEFAULT clock_timestamp(),
    -- The database refuses an event in two batches.
    CONSTRAINT outbox_batches_are_disjoint EXCLUDE USING gist (event_ids WITH &&)
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500
);

-- The lock of the fleet: a relay cuts while it has locked the single row. The key
-- increases with every cut. A reader starts from the last key it saw and skips the
-- row's dead versions, which an old transaction keeps from being vacuumed.
CREATE TABLE {schema}outbox_cursor (
    cuts                  bigint      PRIMARY KEY,
    last_cut_at           timestamptz NOT NULL DEFAULT 'epoch',
    -- Where a cut starts to look. It is a hint: the poll finds what commits below it.
    low_watermark         bigint      NOT NULL DEFAULT 0,
    -- The next low watermark, once transactions below it have had time to commit.
    next_low_watermark    bigint      NOT NULL DEFAULT 0,
    next_low_watermark_at timestamptz NOT NULL DEFAULT 'epoch',
    -- The highest id that was ever cut.
    high_watermark        bigint      NOT NULL DEFAULT 0
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500
);
INSERT INTO {schema}outbox_cursor (cuts) VALUES (0);

-- The PostgreSQL history that the batches belong to. If the server's identity or
-- timeline changes (a failover, a restore), cuts and attempts may be lost after their
-- inserts. A relay then checks at the sink which of the events are present, before it
-- sends them.
CREATE TABLE {schema}outbox_history (
    system_identifier text   NOT NULL,
    timeline          text   NOT NULL,
    -- Events up to this id were published before the history last changed.
    unverified_to     bigint NOT NULL
);
INSERT INTO {schema}outbox_history (system_identifier, timeline, unverified_to)
SELECT system_identifier::text, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), 0
FROM pg_control_system();

-- Events that the sink can never take, with the reason.
CREATE TABLE {schema}outbox_dead_letters (
    id               bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    outbox_event_id  bigint      NOT NULL,
    event_id         uuid        NOT NULL,
    event_type       text        NOT NULL,
    event_date_time  timestamptz NOT NULL,
    environment      text        NOT NULL,
    event_context    json        NOT NULL,
    metadata_version bigint      NOT NULL,
    traceparent      text,
    published_at     timestamptz NOT NULL,
    batch_id         uuid        NOT NULL,
    error            text        NOT NULL,
    dead_lettered_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Publishes an event in the caller's transaction and returns its event_id. A parameter
-- that is left out, or NULL, gets the column's default.
--
-- It returns the id that it inserts, and has no RETURNING, so that the caller needs
-- the right to INSERT only. A deployment may set the environment's default, so the
-- column is left out if the caller gives none.
--
-- BEGIN ATOMIC binds the table when the function is created, whatever the caller's
-- search_path is. The function does not notify, because PostgreSQL serialises the
-- commits of all transactions that notify on one lock.
-- +goose StatementBegin
CREATE FUNCTION {schema}diehard_publish(
    event_type       text,
    event_context    json,
    event_date_time  timestamptz DEFAULT NULL,
    environment      text        DEFAULT NULL,
    metadata_version bigint      DEFAULT NULL,
    traceparent      text        DEFAULT NULL,
    event_id         uuid        DEFAULT NULL
) RETURNS uuid
LANGUAGE sql
BEGIN ATOMIC
    WITH filled AS (
        SELECT coalesce(event_id, gen_random_uuid())         AS id,
               coalesce(event_date_time, clock_timestamp())  AS happened_at,
               coalesce(metadata_version, 1)                 AS version
    ),
    in_given_environment AS (
        INSERT INTO {schema}outbox_events
            (event_id, event_type, event_date_time, event_context, metadata_version, traceparent, environment)
        SELECT id, event_type, happened_at, event_context, version, traceparent, environment
        FROM filled
        WHERE environment IS NOT NULL
    ),
    in_default_environment AS (
        INSERT INTO {schema}outbox_events
            (event_id, event_type, event_date_time, event_context, metadata_version, traceparent)
        SELECT id, event_type, happened_at, event_context, version, traceparent
        FROM filled
        WHERE environment IS NULL
    )
    SELECT id FROM filled;
END;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION {schema}diehard_publish;
DROP TABLE {schema}outbox_dead_letters;
DROP TABLE {schema}outbox_history;
DROP TABLE {schema}outbox_cursor;
DROP TABLE {schema}outbox_batches;
DROP TABLE {schema}outbox_events;
