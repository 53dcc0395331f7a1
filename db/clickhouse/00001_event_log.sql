-- The migrations of ClickHouse are templates. Table is the name of the table.
-- OnCluster is empty on a single server. ClickHouse does not run DDL in transactions,
-- and the servers of a cluster share no version table. Each statement must therefore be
-- repeatable.

-- +goose Up

-- The relay requires these settings, and requires event_id in the sorting key. It refuses
-- a table that does not meet these requirements.
--
-- A merge drops rows with equal sorting keys. Without a deduplication window, ClickHouse
-- ignores the token of an insert. Without fsync, a power failure can lose an event that
-- PostgreSQL has already deleted. ClickHouse syncs inserted parts, but not merged parts.
-- It must therefore keep the source parts of a merge until the system has written the
-- merged part; 480 seconds is ClickHouse's default. The other settings are off by
-- default.
CREATE TABLE IF NOT EXISTS {{.Table}} {{.OnCluster}}
(
    event_id         UUID,
    event_type       LowCardinality(String),
    event_date_time  DateTime64(6, 'UTC'),
    environment      LowCardinality(String),
    event_context    String,
    metadata_version UInt64
)
ENGINE = {{if .OnCluster}}Replicated{{end}}ReplacingMergeTree
PARTITION BY toYYYYMM(event_date_time)
ORDER BY (event_type, event_date_time, event_id)
SETTINGS
{{- if .OnCluster}}
    replicated_deduplication_window = 10000,
    replicated_deduplication_window_seconds = 604800,
{{- else}}
    non_replicated_deduplication_window = 10000,
{{- end}}
    fsync_after_insert = 1,
    fsync_part_directory = 1,
    old_parts_lifetime = 480;
