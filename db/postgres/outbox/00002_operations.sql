-- +goose Up

-- An operator's order to the fleet: a single row. While paused_at is set, relays neither
-- cut nor claim. Publishers are not affected.
CREATE TABLE {schema}outbox_pause (
    singleton boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
    paused_at timestamptz,
    paused_by text
);
INSERT INTO {schema}outbox_pause DEFAULT VALUES;

-- The relays of the fleet. Each relay writes its row when it starts, and then every 20
-- seconds. It deletes its row when it stops. Nothing in the delivery depends on the rows.
CREATE TABLE {schema}outbox_relays (
    relay_id   uuid        PRIMARY KEY,
    host       text        NOT NULL,
    pid        int         NOT NULL,
    version    text        NOT NULL,
    -- The settings that should be equal in the fleet.
    settings   jsonb       NOT NULL,
    -- What the relay does, and why it is not ready.
    state      jsonb       NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at    timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500
);

-- The actions of operators. details names the batch or the dead letters.
CREATE TABLE {schema}outbox_audit (
    id      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor   text        NOT NULL,
    action  text        NOT NULL,
    details jsonb       NOT NULL DEFAULT '{}'
);

-- The housekeeping of the fleet: a row for each task. A relay leases a task before it does
-- it. A lease ends by itself, so that a dead relay holds no task.
CREATE TABLE {schema}outbox_housekeeping (
    task            text        PRIMARY KEY,
    holder          uuid,
    leased_until    timestamptz NOT NULL DEFAULT '-infinity',
    due_at          timestamptz NOT NULL DEFAULT '-infinity',
    last_success_at timestamptz,
    -- The task vacuum has left dead rows, because a snapshot keeps them. Transactions
    -- before this one have deleted the rows.
    blocked_to      bigint      NOT NULL DEFAULT 0
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500
);

-- Estimates the bytes of the waiting events. PostgreSQL does not return the space of
-- deleted rows to the file system, so the size of the table alone would stay high after an
-- outage. The estimate is the number of live rows multiplied by the size of a row, and at
-- most the size of the table. The size of a row is the average of the newest 100 rows, and
-- 200 bytes for the small columns and the index. A crash resets the statistics, so the
-- number of live rows is at least that of the last vacuum.
--
-- The function has the rights of its owner, so that a publisher can call it who may not
-- read events. BEGIN ATOMIC binds all names when the function is created.
-- +goose StatementBegin
CREATE FUNCTION {schema}diehard_backlog_bytes() RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER
BEGIN ATOMIC
    SELECT least(
        pg_table_size('{schema_literal}outbox_events'::regclass) + pg_indexes_size('{schema_literal}outbox_events'::regclass),
        greatest(pg_stat_get_live_tuples('{schema_literal}outbox_events'::regclass)::float8,
                 (SELECT reltuples FROM pg_class WHERE oid = '{schema_literal}outbox_events'::regclass), 0) *
        (SELECT coalesce(avg(pg_column_size(newest.event_context)), 0)::float8 + 200
         FROM (SELECT event_context FROM {schema}outbox_events ORDER BY id DESC LIMIT 100) AS newest)
    )::bigint;
END;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION {schema}diehard_backlog_bytes;
DROP TABLE {schema}outbox_housekeeping;
DROP TABLE {schema}outbox_audit;
DROP TABLE {schema}outbox_relays;
DROP TABLE {schema}outbox_pause;
