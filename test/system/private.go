package system

import (
	"context"
	"log/slog"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// Private is a spec's own engines, which the spec may break.
type Private struct {
	Postgres       *devstack.Postgres
	ClickHouse     *devstack.ClickHouse
	PostgresDSN    string
	ClickHouseDSNs testengines.ClickHouseDSNs
}

// StartPrivate starts engines with one migrated database each. They end with
// the spec.
func StartPrivate(ctx context.Context, p devstack.PostgresOptions, c devstack.ClickHouseOptions) *Private {
	GinkgoHelper()
	e := &Private{}
	var err error
	e.Postgres, err = devstack.StartPostgres(ctx, p)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { Expect(e.Postgres.Stop()).To(Succeed()) })
	e.PostgresDSN, err = e.Postgres.CreateDatabase(ctx, "diehard")
	Expect(err).NotTo(HaveOccurred())
	db, err := postgres.Open(postgres.Options{DSN: e.PostgresDSN})
	Expect(err).NotTo(HaveOccurred())
	Expect(testengines.Schema.Migrate(ctx, db.DB, slog.New(slog.DiscardHandler))).To(Succeed())
	Expect(db.Close()).To(Succeed())

	e.ClickHouse, err = devstack.StartClickHouse(ctx, c)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { Expect(e.ClickHouse.Stop()).To(Succeed()) })
	e.ClickHouseDSNs = testengines.ClickHouseDSNs{Native: e.ClickHouse.NativeDSN("default"), HTTP: e.ClickHouse.HTTPDSN("default")}
	Expect(clickhouse.Migrate(ctx, clickhouse.Options{DSN: e.ClickHouseDSNs.Native}, slog.New(slog.DiscardHandler))).To(Succeed())
	// Merges would hide duplicates. This setting survives a restart of the
	// server; SYSTEM STOP MERGES does not.
	testengines.Query(ctx, "clickhouse", e.ClickHouseDSNs.HTTP, "ALTER TABLE event_log MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1")
	return e
}

// KeepDuplicates replaces the empty table of a migrated database by a table whose merges
// keep duplicates, so that merges can run.
func KeepDuplicates(ctx context.Context, dsns testengines.ClickHouseDSNs) {
	GinkgoHelper()
	for _, statement := range []string{
		"CREATE TABLE keeping AS event_log ENGINE = MergeTree PARTITION BY toYYYYMM(event_date_time)" +
			" ORDER BY (event_type, event_date_time, event_id)" +
			" SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1, fsync_part_directory = 1, old_parts_lifetime = 480",
		"DROP TABLE event_log",
		"RENAME TABLE keeping TO event_log",
	} {
		testengines.Query(ctx, "clickhouse", dsns.HTTP, statement)
	}
}
