-- The migrations of ClickHouse are templates. Table is the table's name, and
-- OnCluster is empty on a single server. ClickHouse has no transactions for them
-- and a cluster no common record of them, so each statement can be run again.

-- +goose Up

-- The relay leans on these settings and on event_id in the sorting key, and
-- refuses a table without them. A merge drops rows whose sorting keys are equal.
-- Without a window the token of an insert is not looked at. Without fsync an
-- event could be gone from PostgreSQL and from ClickHouse after a power failure:
-- an insert is synced, and a merge is not, so that what was merged has to stay
-- until the system has written what came of it. By default ClickHouse keeps it
-- for those 480 seconds, and has the other settings off.
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
