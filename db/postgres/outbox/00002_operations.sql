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

-- The actions of operators: what was done, by whom, and to what.
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

-- +goose Down
DROP TABLE {schema}outbox_housekeeping;
DROP TABLE {schema}outbox_audit;
DROP TABLE {schema}outbox_relays;
DROP TABLE {schema}outbox_pause;
