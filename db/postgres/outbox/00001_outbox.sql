-- +goose Up

-- Events that are not delivered yet. The publisher inserts a row, and a relay deletes it
-- after the sink has acknowledged it. Rows are never updated. The columns are the
-- contract with publishers that use SQL. All columns except event_type and event_context
-- have a default.
CREATE TABLE {schema}outbox_events (
    id               bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id         uuid        NOT NULL DEFAULT gen_random_uuid()
        -- A client that forgets to generate an id often sends the nil UUID.
        CONSTRAINT event_id_is_not_nil CHECK (event_id <> '00000000-0000-0000-0000-000000000000'),
    event_type       text        NOT NULL
        -- A regular expression with a count ({0,127}) would take half the time of an
        -- insert.
        CONSTRAINT event_type_is_snake_case CHECK (octet_length(event_type) <= 128 AND event_type ~ '^[a-z][a-z0-9_]*$'),
    event_date_time  timestamptz NOT NULL DEFAULT clock_timestamp()
        -- The range of RFC 3339. If the sink cannot store the time, the event becomes a
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
        -- The maximum of outbox.max_event_bytes. A relay uses about three times the
        -- size of an event in memory.
        CONSTRAINT event_context_is_at_most_128_mib CHECK (context_bytes <= 134217728)
) WITH (
    -- The thresholds are absolute because the table is emptied all the time. Each cut
    -- reads dead index entries until a vacuum removes them.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 50000,
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 200000
);

-- A batch contains the events of one insert, and its token. A relay commits a batch
-- before it sends the first byte of the batch. Every attempt therefore sends the same
-- rows in the same order.
CREATE TABLE {schema}outbox_batches (
    batch_id        uuid            PRIMARY KEY,
    event_ids       int8multirange  NOT NULL CHECK (NOT isempty(event_ids)),
    event_count     int             NOT NULL CHECK (event_count > 0),
    byte_count      bigint          NOT NULL,
    token           text            NOT NULL,
    -- The number of attempts under this token: claims that may have inserted.
    attempts        int             NOT NULL DEFAULT 0,
    last_attempt_at timestamptz,
    next_attempt_at timestamptz     NOT NULL DEFAULT '-infinity',
    -- Failed attempts that the data of the batch may have caused. A batch with a failure
    -- uses at most one worker of each relay, and does not prevent cuts.
    failures        int             NOT NULL DEFAULT 0,
    -- The batch collects events of quarantined types.
    quarantined     boolean         NOT NULL DEFAULT false,
    last_error      text,
    created_at      timestamptz     NOT NULL DEFAULT clock_timestamp(),
    -- The table of the sink to which the first attempt was made, by an identity that does
    -- not depend on names and addresses.
    destination     text,
    -- The database refuses an event in two batches.
    CONSTRAINT outbox_batches_are_disjoint EXCLUDE USING gist (event_ids WITH &&)
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500
);

-- The lock of the fleet: a relay cuts while it holds the lock on the single row. The key
-- increases with every cut. A reader starts at the last key that it saw. It thereby skips
-- dead row versions that an old transaction protects from vacuum. A unique index that
-- allows one row only would make each cut read all of these versions. So a relay removes
-- additional rows, and writes a missing row.
CREATE TABLE {schema}outbox_cursor (
    cuts                  bigint      PRIMARY KEY,
    -- The clock of the linger.
    last_cut_at           timestamptz NOT NULL DEFAULT 'epoch',
    -- The order of the batch ids. It is never set back, also if the clock is.
    last_batch_at         timestamptz NOT NULL DEFAULT 'epoch',
    -- A cut searches for events above this id. It is a hint: the poll finds late commits
    -- below it.
    low_watermark         bigint      NOT NULL DEFAULT 0,
    -- The next low watermark. A cut applies it later, after transactions with lower ids
    -- had time to commit.
    next_low_watermark    bigint      NOT NULL DEFAULT 0,
    next_low_watermark_at timestamptz NOT NULL DEFAULT 'epoch',
    -- The highest id that was cut.
    high_watermark        bigint      NOT NULL DEFAULT 0
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500
);
INSERT INTO {schema}outbox_cursor (cuts) VALUES (0);

-- The PostgreSQL history that the batches belong to: a single row. After a failover, a
-- restore or a switchover to another server, PostgreSQL can lack cuts and attempts whose
-- inserts have reached the sink. The values below show such a change. A relay then checks
-- the presence of all waiting events before it inserts them.
CREATE TABLE {schema}outbox_history (
    singleton         boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
    system_identifier text        NOT NULL,
    timeline          text        NOT NULL,
    database_oid      oid         NOT NULL,
    -- The transaction that wrote the row, as in the system column xmin. If a dump, a
    -- replication or a person has written the row, the two values differ.
    recorded_by       xid         NOT NULL DEFAULT pg_current_xact_id()::xid,
    recorded_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- A new value for each recorded change. Relays remember it. ancestors has the values
    -- of the earlier changes.
    incarnation       uuid        NOT NULL DEFAULT gen_random_uuid(),
    ancestors         uuid[]      NOT NULL DEFAULT '{}',
    -- Events up to this id were published before the last change of history.
    unverified_to     bigint      NOT NULL DEFAULT 0,
    -- The longest time limit of an insert (relay.flush_timeout) that any relay has used.
    flush_timeout     interval    NOT NULL DEFAULT '0'
);
-- A later migration fills in the server.
INSERT INTO {schema}outbox_history (system_identifier, timeline, database_oid) VALUES ('', '', 0);

-- The fuse of the fleet: a single row. It counts dead letters. If too many events become
-- dead letters in an hour, the fuse blows, and no more events become dead letters until an
-- operator mends it.
CREATE TABLE {schema}outbox_fuse (
    singleton      boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
    -- The start of the hour.
    since          timestamptz NOT NULL,
    dead_letters   bigint      NOT NULL,
    -- The highest id that was cut at the start of the hour.
    high_watermark bigint      NOT NULL,
    blown_at       timestamptz
);
INSERT INTO {schema}outbox_fuse (since, dead_letters, high_watermark) VALUES (clock_timestamp(), 0, 0);

-- Event types whose inserts all fail, for example because a materialized view throws.
-- Relays put events of these types into separate batches, so that other events do not
-- wait for them.
CREATE TABLE {schema}outbox_quarantine (
    event_type text        PRIMARY KEY,
    error      text        NOT NULL,
    since      timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Events that the sink refused because of their data, with the error.
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
    -- The batch from which the event was dead-lettered, with its token and its destination.
    -- A late insert of the batch may still add the event. A requeued event therefore keeps
    -- the token.
    batch_id         uuid        NOT NULL,
    token            text        NOT NULL,
    destination      text,
    error            text        NOT NULL,
    dead_lettered_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Publishes an event in the caller's transaction and returns its event_id. A parameter
-- that is omitted or NULL gets the default of the column.
--
-- The function generates the id itself, because RETURNING would require the SELECT
-- privilege. The caller needs only the INSERT privilege. A deployment can change the
-- default of the column environment, so the function omits the column if the caller
-- passes NULL.
--
-- BEGIN ATOMIC binds the table when the function is created, independently of the
-- caller's search_path. The function does not notify, because PostgreSQL serialises the
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
DROP TABLE {schema}outbox_quarantine;
DROP TABLE {schema}outbox_fuse;
DROP TABLE {schema}outbox_history;
DROP TABLE {schema}outbox_cursor;
DROP TABLE {schema}outbox_batches;
DROP TABLE {schema}outbox_events;
