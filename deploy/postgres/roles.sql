-- Roles with the least rights that Diehard needs. The roles cannot log in: grant them to
-- the users of your programs, such as GRANT diehard_relay TO relay_production.
--
--   diehard_migrations  owns the tables: `relay migrate` and `api migrate`
--   diehard_api         the API
--   diehard_relay       the relays
--   diehard_operator    `relay status`, `pause`, `resume`, `batches` and `dead-letters`. The
--                       relay's page uses the role of the relay: grant diehard_operator to
--                       its user too, so that operators can act on the page.
--   diehard_publisher   an application that publishes events by itself
--
-- Run this file before the first migration, and again after each migration, as a superuser
-- or as a role with CREATEROLE that owns the schema. It creates missing roles and rights,
-- and keeps all other rights. It needs PostgreSQL 15 or newer.
DO $roles$
DECLARE
    -- The schema of the tables: postgres.schema, or the first schema of the search_path.
    target  text := 'public';
    wanted  record;
    found   regclass;
BEGIN
    FOR wanted IN SELECT unnest(ARRAY['diehard_migrations', 'diehard_api', 'diehard_relay', 'diehard_operator', 'diehard_publisher']) AS role
    LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted.role) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN', wanted.role);
        END IF;
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', target, wanted.role);
    END LOOP;
    EXECUTE format('GRANT CREATE ON SCHEMA %I TO diehard_migrations', target);

    FOR wanted IN SELECT * FROM (VALUES
        ('diehard_api', 'SELECT', 'diehard_outbox_version'),
        ('diehard_api', 'SELECT', 'diehard_users_version'),
        ('diehard_api', 'SELECT, INSERT, UPDATE, DELETE', 'users'),
        ('diehard_api', 'SELECT, INSERT, UPDATE, DELETE', 'idempotency_keys'),
        ('diehard_api', 'INSERT (event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent)', 'outbox_events'),

        ('diehard_publisher', 'INSERT (event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent)', 'outbox_events'),

        ('diehard_relay', 'SELECT', 'diehard_outbox_version'),
        ('diehard_relay', 'SELECT, DELETE', 'outbox_events'),
        ('diehard_relay', 'SELECT, INSERT, UPDATE, DELETE', 'outbox_batches'),
        ('diehard_relay', 'SELECT, INSERT, UPDATE, DELETE', 'outbox_cursor'),
        ('diehard_relay', 'SELECT, INSERT, UPDATE, DELETE', 'outbox_history'),
        ('diehard_relay', 'SELECT, INSERT, UPDATE', 'outbox_fuse'),
        ('diehard_relay', 'SELECT, INSERT, DELETE', 'outbox_quarantine'),
        ('diehard_relay', 'SELECT', 'outbox_pause'),
        ('diehard_relay', 'SELECT, INSERT, UPDATE, DELETE', 'outbox_relays'),
        ('diehard_relay', 'SELECT, INSERT, UPDATE', 'outbox_housekeeping'),
        ('diehard_relay', 'SELECT, DELETE', 'outbox_audit'),
        -- DELETE is for housekeeping.dead_letter_retention only.
        ('diehard_relay', 'SELECT, INSERT, DELETE', 'outbox_dead_letters'),
        ('diehard_relay', 'SELECT', 'outbox_events_id_seq'),

        ('diehard_operator', 'SELECT', 'diehard_outbox_version'),
        ('diehard_operator', 'SELECT, INSERT', 'outbox_events'), -- a retry writes events back
        ('diehard_operator', 'SELECT, INSERT, UPDATE', 'outbox_batches'),
        ('diehard_operator', 'SELECT, UPDATE', 'outbox_cursor'),
        ('diehard_operator', 'SELECT, UPDATE', 'outbox_history'), -- locks it for a retry
        ('diehard_operator', 'SELECT, UPDATE', 'outbox_fuse'),
        ('diehard_operator', 'SELECT', 'outbox_quarantine'),
        ('diehard_operator', 'SELECT, INSERT, UPDATE', 'outbox_pause'),
        ('diehard_operator', 'SELECT', 'outbox_relays'),
        ('diehard_operator', 'SELECT, INSERT', 'outbox_audit'),
        ('diehard_operator', 'SELECT, DELETE', 'outbox_dead_letters'),
        ('diehard_operator', 'SELECT', 'outbox_events_id_seq')
    ) AS wanted (role, rights, object)
    LOOP
        found := to_regclass(format('%I.%I', target, wanted.object));
        IF found IS NOT NULL THEN
            EXECUTE format('GRANT %s ON %s %s TO %I', wanted.rights,
                CASE WHEN wanted.object LIKE '%\_seq' THEN 'SEQUENCE' ELSE 'TABLE' END, found, wanted.role);
        END IF;
    END LOOP;

    -- Everybody may call functions, unless the default privileges were changed.
    FOR wanted IN SELECT * FROM (VALUES
        ('diehard_relay', 'diehard_server'), ('diehard_operator', 'diehard_server'),
        ('diehard_relay', 'diehard_backlog_bytes'), ('diehard_operator', 'diehard_backlog_bytes'), ('diehard_api', 'diehard_backlog_bytes'),
        ('diehard_publisher', 'diehard_publish')
    ) AS wanted (role, object)
    LOOP
        IF to_regproc(format('%I.%I', target, wanted.object)) IS NOT NULL THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %I.%I TO %I', target, wanted.object, wanted.role);
        END IF;
    END LOOP;

    -- The relays recognize the server after a failover, by a function with the rights of its
    -- owner. Without this right, they do not know the identifier of the server.
    BEGIN
        GRANT EXECUTE ON FUNCTION pg_control_system() TO diehard_migrations;
    EXCEPTION WHEN insufficient_privilege THEN
        RAISE NOTICE 'diehard_migrations may not execute pg_control_system(): %', SQLERRM;
    END;
    -- The fleet vacuums outbox_events, so that the table stays small.
    found := to_regclass(format('%I.outbox_events', target));
    IF found IS NOT NULL AND current_setting('server_version_num')::int >= 170000 THEN
        EXECUTE format('GRANT MAINTAIN ON %s TO diehard_relay', found);
    END IF;
END
$roles$;
