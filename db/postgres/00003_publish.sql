-- +goose Up

-- The lock on the table is held for no longer than the catalog's change, but
-- it has to wait for every transaction that is publishing or delivering, and
-- all that come later wait behind it. Rather than that, the migration fails
-- after a few seconds and can be run again.
SET LOCAL lock_timeout = '5s';

-- What pkg/outbox refuses and the table took. NOT VALID: neither is the table
-- read under the lock, nor does an event that waits, and that will be delivered
-- all the same, stop the migration. They hold for every row from here on, and
-- those from before are gone once they are delivered.
ALTER TABLE outbox_events
    -- The likeliest id to be given to two events: what a client sends that has
    -- not made one.
    ADD CONSTRAINT event_id_is_not_nil
        CHECK (event_id <> '00000000-0000-0000-0000-000000000000') NOT VALID,
    ADD CONSTRAINT traceparent_is_w3c
        CHECK (traceparent ~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$') NOT VALID,
    -- The highest that outbox.max_event_bytes can be: a relay holds about three
    -- times the event in memory.
    ADD CONSTRAINT event_context_is_at_most_128_mib
        CHECK (context_bytes <= 134217728) NOT VALID;

-- A retry of a dead letter inserts its event again, and would be refused.
UPDATE outbox_dead_letters
SET traceparent = NULL
WHERE traceparent !~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$';

-- Publishes an event in the caller's transaction and returns its event_id. An
-- optional parameter that is left out, or NULL, gets the column's default.
--
-- It returns the id that it inserts, and has no RETURNING, so that INSERT is
-- all that the caller needs on the table. The environment's default is the one
-- that a deployment sets, so the column is left out where the caller does.
--
-- BEGIN ATOMIC binds the table here and now: it is this one, whatever schema
-- it is in and whatever the caller's search_path is. It does not notify,
-- because PostgreSQL puts the commits of all transactions that notify behind
-- one lock.
-- +goose StatementBegin
CREATE FUNCTION diehard_publish(
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
        INSERT INTO outbox_events
            (event_id, event_type, event_date_time, event_context, metadata_version, traceparent, environment)
        SELECT id, event_type, happened_at, event_context, version, traceparent, environment
        FROM filled
        WHERE environment IS NOT NULL
    ),
    in_default_environment AS (
        INSERT INTO outbox_events
            (event_id, event_type, event_date_time, event_context, metadata_version, traceparent)
        SELECT id, event_type, happened_at, event_context, version, traceparent
        FROM filled
        WHERE environment IS NULL
    )
    SELECT id FROM filled;
END;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION diehard_publish;
ALTER TABLE outbox_events
    DROP CONSTRAINT event_id_is_not_nil,
    DROP CONSTRAINT traceparent_is_w3c,
    DROP CONSTRAINT event_context_is_at_most_128_mib;
