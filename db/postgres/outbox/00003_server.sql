-- +goose Up

-- Identifies the server and its history, for outbox_history. Hosting providers do not allow
-- all of it:
--
--   system_identifier  is empty if the owner of the function may not read it.
--   timeline           is the start of the server if the server does not show its timeline.
--                      Amazon Aurora does not, unless logical replication is on. A new
--                      primary has another start, and so has a server that was restarted.
--
-- The function has the rights of its owner, so that all relays get the same result. Errors
-- that pass are errors: a server without free memory, or one that shuts down, has not
-- refused anything. The codes of a provider are not known, so all other errors count.
-- +goose StatementBegin
CREATE FUNCTION {schema}diehard_server(OUT system_identifier text, OUT timeline text)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    BEGIN
        SELECT control.system_identifier::text INTO system_identifier FROM pg_control_system() AS control;
    EXCEPTION WHEN OTHERS THEN
        IF left(SQLSTATE, 2) IN ('53', '57', '58') THEN
            RAISE;
        END IF;
        system_identifier := '';
    END;
    BEGIN
        timeline := substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8);
    EXCEPTION WHEN OTHERS THEN
        IF left(SQLSTATE, 2) IN ('53', '57', '58') OR pg_is_in_recovery() THEN
            RAISE;
        END IF;
        timeline := 'start ' || extract(epoch FROM pg_postmaster_start_time());
    END;
END
$function$;
-- +goose StatementEnd

UPDATE {schema}outbox_history
SET system_identifier = server.system_identifier,
    timeline          = server.timeline,
    database_oid      = pg_database.oid,
    recorded_by       = pg_current_xact_id()::xid
FROM {schema}diehard_server() AS server, pg_database
WHERE datname = current_database() AND outbox_history.database_oid = 0;

-- +goose Down

DROP FUNCTION {schema}diehard_server();
