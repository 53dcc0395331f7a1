-- Roles with the least rights that Diehard needs in ClickHouse. Grant them to the users of
-- your programs, such as GRANT diehard_relay TO relay_production.
--
--   diehard_migrations  `relay migrate`
--   diehard_relay       the relays, and `relay check`
--   diehard_check       `relay check --deep`, in addition to diehard_relay
--
-- Run this file in the database of the event log, before the first migration:
--
--   clickhouse-client --database diehard --queries-file roles.sql
--
-- It can be repeated. If clickhouse.table is not event_log, replace this name. All relays
-- must be the same user, or users that may see each other's statements: a relay looks for
-- the inserts of the other relays in system.processes.

CREATE ROLE IF NOT EXISTS diehard_migrations;
GRANT CREATE TABLE ON event_log TO diehard_migrations;
GRANT CREATE TABLE, INSERT, SELECT ON event_log_db_version TO diehard_migrations;
GRANT SELECT ON system.tables TO diehard_migrations;
GRANT SELECT ON system.settings TO diehard_migrations;

CREATE ROLE IF NOT EXISTS diehard_relay;
GRANT INSERT, SELECT ON event_log TO diehard_relay;
-- These show the table and its parts. A user sees the rows of tables that it may read.
GRANT SELECT ON system.tables TO diehard_relay;
GRANT SELECT ON system.columns TO diehard_relay;
GRANT SELECT ON system.parts TO diehard_relay;
GRANT SELECT ON system.replicas TO diehard_relay;
-- This shows running inserts.
GRANT SELECT ON system.processes TO diehard_relay;
-- These show the settings that the delivery relies on.
GRANT SELECT ON system.settings TO diehard_relay;
GRANT SELECT ON system.merge_tree_settings TO diehard_relay;
GRANT SELECT ON system.replicated_merge_tree_settings TO diehard_relay;

-- The scratch tables have names with this prefix, and are dropped at the end.
CREATE ROLE IF NOT EXISTS diehard_check;
GRANT CREATE TABLE, DROP TABLE, ALTER TABLE, INSERT, SELECT ON event_log_check_* TO diehard_check;

-- On a cluster (clickhouse.cluster), add ON CLUSTER to each statement above, and also:
--
-- GRANT CLUSTER ON *.* TO diehard_migrations, diehard_check;
-- GRANT REMOTE ON *.* TO diehard_relay, diehard_check;
