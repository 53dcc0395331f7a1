-- +goose Up

-- Events that are not yet delivered. A row is inserted by the publisher, never
-- updated, and deleted once the sink has acknowledged it. The columns are the
-- contract with publishers that write SQL; all but event_type and
-- event_context have a default.
CREATE TABLE outbox_events (
    id               bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id         uuid        NOT NULL DEFAULT gen_random_uuid(),
    event_type       text        NOT NULL
        CONSTRAINT event_type_is_snake_case CHECK (event_type ~ '^[a-z][a-z0-9_]{0,127}$'),
    event_date_time  timestamptz NOT NULL DEFAULT clock_timestamp()
        -- What RFC 3339 can write. What the sink cannot hold becomes a dead letter.
        CONSTRAINT event_date_time_is_in_years_1_to_9999
            CHECK (event_date_time >= '0001-01-01 00:00:00+00' AND event_date_time < '10000-01-01 00:00:00+00'),
    environment      text        NOT NULL DEFAULT 'Local'
        CONSTRAINT environment_is_short CHECK (octet_length(environment) BETWEEN 1 AND 128),
    -- json and not jsonb: kept byte for byte, and cheaper to write and to read.
    event_context    json        NOT NULL,
    metadata_version bigint      NOT NULL DEFAULT 1
        CONSTRAINT metadata_version_is_not_negative CHECK (metadata_version >= 0),
    traceparent      text,
    published_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- pg_column_size would give the compressed size.
    context_bytes    int         NOT NULL GENERATED ALWAYS AS (octet_length(event_context::text)) STORED
) WITH (
    -- The table turns over completely: a share of its rows is no measure, and
    -- dead index entries cost every cut until they are vacuumed.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 50000,
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 200000
);

-- The manifests: which events one insert into the sink carries, and the token
-- it carries them under. Durable before the first byte is sent, so that
-- whoever sends again sends the same rows in the same order.
CREATE TABLE outbox_batches (
    batch_id        uuid            PRIMARY KEY,
    event_ids       int8multirange  NOT NULL CHECK (NOT isempty(event_ids)),
    event_count     int             NOT NULL CHECK (event_count > 0),
    byte_count      bigint          NOT NULL,
    token           text            NOT NULL,
    -- Sends under this token that have happened or may have happened.
    sends           int             NOT NULL DEFAULT 0,
    last_sent_at    timestamptz,
    next_attempt_at timestamptz     NOT NULL DEFAULT '-infinity',
    last_error      text,
    created_at      timestamptz     NOT NULL DEFAULT clock_timestamp(),
    -- The database itself refuses an event in two manifests.
    CONSTRAINT outbox_batches_are_disjoint EXCLUDE USING gist (event_ids WITH &&)
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500
);

-- The fleet's cutter: its single row is the lock under which manifests are
-- cut. The key moves with every cut, so that a reader that starts from the
-- last key it saw does not wade through the row's dead versions while an old
-- transaction keeps vacuum from removing them.
CREATE TABLE outbox_cursor (
    cuts          bigint      PRIMARY KEY,
    last_cut_at   timestamptz NOT NULL DEFAULT 'epoch',
    -- Where a cut starts to look. A hint: the sweep finds what committed below.
    floor         bigint      NOT NULL DEFAULT 0,
    -- The floor to be, once it is old enough for stragglers to have committed.
    next_floor    bigint      NOT NULL DEFAULT 0,
    next_floor_at timestamptz NOT NULL DEFAULT 'epoch',
    -- The highest id that was ever cut.
    cut_to        bigint      NOT NULL DEFAULT 0
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500
);
INSERT INTO outbox_cursor (cuts) VALUES (0);

-- Which PostgreSQL history the manifests belong to. When the server's identity
-- or timeline changes (a failover, a restore), cuts and marks may have been
-- lost after their batches were sent: what was there then is asked for at the
-- sink before it is sent.
CREATE TABLE outbox_origin (
    system_identifier text   NOT NULL,
    timeline          text   NOT NULL,
    -- Events up to this id were there when the history last changed.
    suspect_to        bigint NOT NULL
);
INSERT INTO outbox_origin (system_identifier, timeline, suspect_to)
SELECT system_identifier::text, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), 0
FROM pg_control_system();

-- Events that the sink can never take, with the reason.
CREATE TABLE outbox_dead_letters (
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
    died_at          timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- +goose Down
DROP TABLE outbox_dead_letters;
DROP TABLE outbox_origin;
DROP TABLE outbox_cursor;
DROP TABLE outbox_batches;
DROP TABLE outbox_events;
