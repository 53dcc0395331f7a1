package clickhouse_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

// Pieces of the table's definition. Each spec changes one of them.
const (
	theOrder    = " ORDER BY (event_type, event_date_time, event_id)"
	theSettings = " SETTINGS non_replicated_deduplication_window = 1000, fsync_after_insert = 1, fsync_part_directory = 1"
)

// theColumns returns the table's columns. An argument "name definition" replaces or adds
// a column. An argument that is only a name removes the column.
func theColumns(others ...string) string {
	columns := []string{
		"event_id UUID", "event_type LowCardinality(String)", "event_date_time DateTime64(6, 'UTC')",
		"environment LowCardinality(String)", "event_context String", "metadata_version UInt64",
	}
	for _, other := range others {
		name, definition, _ := strings.Cut(other, " ")
		i := slices.IndexFunc(columns, func(column string) bool { return strings.HasPrefix(column, name+" ") })
		switch {
		case definition == "":
			columns = slices.Delete(columns, i, i+1)
		case i < 0:
			columns = append(columns, other)
		default:
			columns[i] = other
		}
	}
	return strings.Join(columns, ", ")
}

func create(columns, engine string) string {
	return "CREATE TABLE event_log (" + columns + ") ENGINE = " + engine
}

// aRow inserts an event before the check.
const aRow = "INSERT INTO event_log (event_id, event_date_time) VALUES (generateUUIDv4(), '2026-01-01 00:00:00')"

var _ = Describe("Check", func() {
	for _, protocol := range protocols {
		Context("over "+protocol, func() {
			DescribeTable("names the problem and a remedy that works and keeps the rows",
				func(ctx SpecContext, problem string, statements ...string) {
					db := newDatabase(ctx, protocol)
					for _, statement := range statements {
						db.exec(ctx, statement)
					}
					s := db.open(clickhouse.Options{})
					unfit := misconfigured(s.Check(ctx))
					Expect(unfit.Problem).To(ContainSubstring(problem))
					before := db.count(ctx)
					db.follow(ctx, unfit.Remedy)
					Expect(s.Check(ctx)).To(Succeed(), "after %s", unfit.Remedy)
					Expect(db.count(ctx)).To(Equal(before), "after %s", unfit.Remedy)
					expectDelivery(ctx, s)
				},
				Entry("if the table is missing", "the table `event_log` does not exist"),
				Entry("if the engine is Log", "engine of the table `event_log` is Log, which does not keep every event once",
					create(theColumns(), "Log"), aRow),
				Entry("if the engine is Memory", "is Memory", create(theColumns(), "Memory"), aRow),
				Entry("if the engine is Null", "is Null", create(theColumns(), "Null"), aRow),
				Entry("if the engine is AggregatingMergeTree", "is AggregatingMergeTree",
					create(theColumns(), "AggregatingMergeTree"+theOrder+theSettings), aRow),
				Entry("if the engine is SummingMergeTree", "is SummingMergeTree",
					create(theColumns(), "SummingMergeTree"+theOrder+theSettings), aRow),
				Entry("if the engine is CollapsingMergeTree", "is CollapsingMergeTree",
					create(theColumns("sign Int8 DEFAULT 1"), "CollapsingMergeTree(sign)"+theOrder+theSettings), aRow),
				Entry("if the table is on another server", "is Proxy",
					"CREATE TABLE elsewhere ("+theColumns()+") ENGINE = MergeTree"+theOrder+theSettings,
					"CREATE TABLE event_log AS remote('127.0.0.1', currentDatabase(), 'elsewhere')"),
				Entry("if inserts wait in a Buffer", "is Buffer",
					"CREATE TABLE behind ("+theColumns()+") ENGINE = MergeTree"+theOrder+theSettings,
					create(theColumns(), "Buffer(currentDatabase(), behind, 1, 10, 100, 10, 100, 10000, 100000)"), aRow),
				Entry("if the table is a view", "is View",
					"CREATE TABLE behind ("+theColumns()+") ENGINE = MergeTree"+theOrder+theSettings,
					"CREATE VIEW event_log AS SELECT * FROM behind"),
				Entry("if the engine and a column are wrong", "is Log", create(theColumns("environment"), "Log"), aRow),
				Entry("if the engine is wrong, and the rows have times in more than a hundred months", "is Log", create(theColumns(), "Log"),
					"INSERT INTO event_log (event_id, event_date_time) SELECT generateUUIDv4(), addMonths(toDateTime('2000-01-01 00:00:00'), number) FROM numbers(101)"),
				Entry("if merges drop events with equal keys", "ordered by (event_type, event_date_time), without event_id: merges drop events",
					create(theColumns(), "ReplacingMergeTree ORDER BY (event_type, event_date_time)"+theSettings), aRow),
				Entry("if the sorting key contains event_id only within an expression", "without event_id",
					create(theColumns(), "ReplacingMergeTree ORDER BY (event_type, cityHash64(event_id))"+theSettings), aRow),

				Entry("if no deduplication window is set", "has non_replicated_deduplication_window off",
					create(theColumns(), "ReplacingMergeTree"+theOrder+" SETTINGS fsync_after_insert = 1, fsync_part_directory = 1"), aRow),
				Entry("if the deduplication window is 0", "has non_replicated_deduplication_window off",
					create(theColumns(), "ReplacingMergeTree"+theOrder+theSettings), aRow,
					"ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 0"),
				Entry("if the deduplication window is too short", "has non_replicated_deduplication_window below 1000",
					create(theColumns(), "ReplacingMergeTree"+theOrder+theSettings), aRow,
					"ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 1"),
				Entry("if the rows are not synced", "has fsync_after_insert off",
					create(theColumns(), "ReplacingMergeTree"+theOrder+theSettings), aRow,
					"ALTER TABLE event_log MODIFY SETTING fsync_after_insert = 0"),
				Entry("if the folder of a part is not synced", "has fsync_part_directory off",
					create(theColumns(), "ReplacingMergeTree"+theOrder+theSettings), aRow,
					"ALTER TABLE event_log RESET SETTING fsync_part_directory"),
				Entry("if the source parts of a merge are deleted at once", "has old_parts_lifetime off",
					create(theColumns(), "ReplacingMergeTree"+theOrder+theSettings+", old_parts_lifetime = 0"), aRow),
				Entry("if the source parts of a merge are deleted before the merged part is on disk", "has old_parts_lifetime below 60",
					create(theColumns(), "ReplacingMergeTree"+theOrder+theSettings), aRow,
					"ALTER TABLE event_log MODIFY SETTING old_parts_lifetime = 59"),
				Entry("if the lifetime of source parts is a fraction below 60", "has old_parts_lifetime below 60",
					create(theColumns(), "ReplacingMergeTree"+theOrder+theSettings+", old_parts_lifetime = 59.5"), aRow),
				Entry("if the table has no settings", "has non_replicated_deduplication_window off, fsync_after_insert off, fsync_part_directory off",
					create(theColumns(), "MergeTree"+theOrder), aRow),

				Entry("if a column is missing", "lacks the column environment",
					create(theColumns("environment"), "MergeTree"+theOrder+theSettings), aRow),
				Entry("if two columns are missing", "lacks the column event_context, lacks the column metadata_version",
					create(theColumns("event_context", "metadata_version"), "MergeTree"+theOrder+theSettings), aRow),
				Entry("if the type of the version is too small", "keeps metadata_version as UInt32",
					create(theColumns("metadata_version UInt32"), "MergeTree"+theOrder+theSettings), aRow),
				Entry("if the type truncates the context", "keeps event_context as FixedString(10)",
					create(theColumns("event_context FixedString(10)"), "MergeTree"+theOrder+theSettings), aRow),
				Entry("if the environment may be null", "keeps environment as LowCardinality(Nullable(String))",
					create(theColumns("environment LowCardinality(Nullable(String)) DEFAULT ''"), "MergeTree"+theOrder+theSettings), aRow),
				Entry("if the time is text", "keeps event_date_time as String",
					create(theColumns("event_date_time String"), "MergeTree ORDER BY event_id"+theSettings), aRow),
				Entry("if the time is text and in the sorting key", "keeps event_date_time as String",
					create(theColumns("event_date_time String"), "MergeTree"+theOrder+theSettings), aRow),
				Entry("if the time is in seconds", "keeps event_date_time as DateTime",
					create(theColumns("event_date_time DateTime"), "ReplacingMergeTree ORDER BY event_id"+theSettings), aRow),
				Entry("if the time is in seconds and in the sorting key", "keeps event_date_time as DateTime",
					create(theColumns("event_date_time DateTime"), "ReplacingMergeTree"+theOrder+theSettings), aRow),
				Entry("if the time is in milliseconds and in the partition key", "keeps event_date_time as DateTime64(3)",
					create(theColumns("event_date_time DateTime64(3)"),
						"ReplacingMergeTree PARTITION BY toYYYYMM(event_date_time) ORDER BY event_id"+theSettings), aRow),
				Entry("if a key column and another column are wrong", "keeps event_date_time as DateTime, computes the column event_context",
					create(theColumns("event_date_time DateTime", "event_context String MATERIALIZED '{}'"),
						"ReplacingMergeTree"+theOrder+theSettings), aRow),
				Entry("if a column is materialized", "computes the column environment",
					create(theColumns("environment LowCardinality(String) MATERIALIZED 'Test'"), "MergeTree"+theOrder+theSettings), aRow),
				Entry("if a column is an alias", "computes the column event_context",
					create(theColumns("event_context String ALIAS toString(event_id)"), "MergeTree"+theOrder+theSettings), aRow),
				Entry("if a column is ephemeral", "computes the column metadata_version",
					create(theColumns("metadata_version UInt64 EPHEMERAL"), "MergeTree"+theOrder+theSettings), aRow),
				Entry("if a column is ephemeral and the engine is wrong", "is Log",
					create(theColumns("metadata_version UInt64 EPHEMERAL"), "Log"), aRow),
			)

			It("refuses a Distributed table of an unknown cluster", func(ctx SpecContext) {
				db := newDatabase(ctx, protocol)
				db.exec(ctx, fmt.Sprintf("ATTACH TABLE event_log UUID '%s' (%s) ENGINE = Distributed('diehard', currentDatabase(), shard)",
					uuid.New(), theColumns()))
				Expect(misconfigured(db.open(clickhouse.Options{}).Check(ctx)).Problem).
					To(ContainSubstring("is Distributed, which forwards the rows of an insert later and in pieces"))
			})

			It("reports a table that was dropped, which a migration creates again", func(ctx SpecContext) {
				db := newTable(ctx, protocol)
				db.exec(ctx, "DROP TABLE event_log")
				s := db.open(clickhouse.Options{})
				db.follow(ctx, misconfigured(s.Check(ctx)).Remedy)
				Expect(s.Check(ctx)).To(Succeed())
			})

			It("reports a missing database, with the remedy that creates it", func(ctx SpecContext) {
				db := newDatabase(ctx, protocol)
				missing := &database{name: db.name + "_missing", conn: db.conn}
				missing.dsn = with(db.dsn, func(u *url.URL) { u.Path = "/" + missing.name })
				s := missing.open(clickhouse.Options{})
				unfit := misconfigured(s.Check(ctx))
				Expect(unfit.Problem).To(ContainSubstring("database of the clickhouse dsn does not exist"))
				Expect(misconfigured(clickhouse.Migrate(ctx, clickhouse.Options{DSN: missing.dsn}, slog.New(slog.DiscardHandler)))).To(Equal(unfit))
				DeferCleanup(func(ctx SpecContext) { db.exec(ctx, "DROP DATABASE IF EXISTS "+missing.name) })
				missing.follow(ctx, unfit.Remedy)
				Expect(s.Check(ctx)).To(Succeed())
				expectDelivery(ctx, s)
			})

			for _, readonly := range []string{"1", "2"} {
				It("refuses a DSN with readonly = "+readonly, func(ctx SpecContext) {
					db := newTable(ctx, protocol)
					dsn := db.dsn
					db.dsn = with(dsn, parameter("readonly", readonly))
					unfit := misconfigured(db.open(clickhouse.Options{}).Check(ctx))
					Expect(unfit.Problem).To(ContainSubstring("readonly"))
					Expect(unfit.Remedy).To(Equal("remove readonly from the clickhouse dsn"))
					db.dsn = dsn
					Expect(db.open(clickhouse.Options{}).Check(ctx)).To(Succeed())
				})
			}

			It("refuses a proxy that changes the settings of an insert", func(ctx SpecContext) {
				if !strings.HasPrefix(protocol, "http, ") {
					Skip("the gateway reads uncompressed HTTP")
				}
				db := newTable(ctx, protocol)
				var gateway *faults.Gateway
				gateway, db.dsn = faults.StartGatewayTo(db.dsn)
				for _, imposed := range []string{"async_insert=1", "insert_deduplication_token=", "insert_deduplicate=0"} {
					gateway.Impose(imposed)
					unfit := misconfigured(db.open(clickhouse.Options{}).Check(ctx))
					name, value, _ := strings.Cut(imposed, "=")
					Expect(unfit.Problem).To(ContainSubstring("clickhouse does not receive the settings of an insert: %s is %q", name, value))
				}
				gateway.Impose("")
				Expect(db.open(clickhouse.Options{}).Check(ctx)).To(Succeed())
			})

			It("refuses the table of a single server if a cluster is configured", func(ctx SpecContext) {
				db := newTable(ctx, protocol)
				unfit := misconfigured(db.open(clickhouse.Options{Cluster: "diehard"}).Check(ctx))
				Expect(unfit.Problem).To(ContainSubstring("is not replicated, and a cluster is configured"))
				Expect(unfit.Remedy).To(ContainSubstring("ON CLUSTER 'diehard'"))
			})

			DescribeTable("accepts a table that an operator has created",
				func(ctx SpecContext, statements ...string) {
					db := newDatabase(ctx, protocol)
					for _, statement := range statements {
						db.exec(ctx, statement)
					}
					s := db.open(clickhouse.Options{})
					Expect(s.Check(ctx)).To(Succeed())
					expectDelivery(ctx, s)
				},
				Entry("with the engine MergeTree", create(theColumns(), "MergeTree ORDER BY tuple()"+theSettings)),
				Entry("with another sorting key", create(theColumns(), "ReplacingMergeTree ORDER BY (event_id, event_date_time)"+theSettings)),
				Entry("with further columns", create(theColumns("user_id String MATERIALIZED JSONExtractString(event_context, 'user_id')",
					"ingested_at DateTime DEFAULT now()", "day Date ALIAS toDate(event_date_time)", "source Nullable(String)"), "ReplacingMergeTree"+theOrder+theSettings)),
				Entry("with codecs and defaults", create(theColumns("event_context String DEFAULT '{}' CODEC(ZSTD(3))",
					"metadata_version UInt64 DEFAULT 1 CODEC(T64, LZ4)"), "ReplacingMergeTree"+theOrder+theSettings)),
				Entry("with plain strings, and another time zone", create(theColumns("event_type String", "environment String",
					"event_date_time DateTime64(6, 'Europe/Berlin')"), "ReplacingMergeTree"+theOrder+theSettings)),
				Entry("whose columns have another order", create(`metadata_version UInt64, event_context String, environment String, n UInt8,
					event_date_time DateTime64(6), event_type String, event_id UUID`, "ReplacingMergeTree"+theOrder+theSettings)),
				Entry("with a version and further settings", create(theColumns(), "ReplacingMergeTree(metadata_version) PARTITION BY toYear(event_date_time)"+
					theOrder+theSettings+", index_granularity = 1024")),
			)
		})
	}
})

func (db *database) open(o clickhouse.Options) *clickhouse.Sink {
	GinkgoHelper()
	o.DSN = db.dsn
	s, err := clickhouse.Open(o)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(s.Close)
	return s
}

func misconfigured(err error) *sink.MisconfiguredError {
	GinkgoHelper()
	unfit, ok := errors.AsType[*sink.MisconfiguredError](err)
	Expect(ok).To(BeTrue(), "%v", err)
	return unfit
}

// follow executes the steps of a remedy.
func (db *database) follow(ctx context.Context, remedy string) {
	GinkgoHelper()
	for step := range strings.SplitSeq(remedy, "; ") {
		if step = strings.TrimPrefix(step, "then "); step == "relay migrate" {
			Expect(clickhouse.Migrate(ctx, clickhouse.Options{DSN: db.dsn}, slog.New(slog.DiscardHandler))).To(Succeed(), remedy)
		} else {
			db.exec(ctx, step)
		}
	}
}

// count returns the number of rows in the table, or 0 if the table does not exist.
func (db *database) count(ctx context.Context) (rows uint64) {
	GinkgoHelper()
	var exists uint8
	Expect(db.conn.QueryRow(ctx, "EXISTS TABLE event_log").Scan(&exists)).To(Succeed())
	if exists == 1 {
		Expect(db.conn.QueryRow(ctx, "SELECT count() FROM event_log").Scan(&rows)).To(Succeed())
	}
	return rows
}

// expectDelivery checks that the sink can insert an event and find it.
func expectDelivery(ctx context.Context, s *clickhouse.Sink) {
	GinkgoHelper()
	batch := oneEvent()
	Expect(s.Insert(ctx, batch)).To(Succeed())
	Expect(s.Present(ctx, &batch.Events.Keys)).To(Equal([]bool{true}))
}

// oneEvent returns a batch of a single event.
func oneEvent() sink.Batch {
	id := uuid.New()
	events := &sink.Events{MetadataVersion: []uint64{1}}
	events.EventID = []uuid.UUID{id}
	events.EventType.Append([]byte("checked"))
	events.EventDateTime = []int64{time.Date(2026, 1, 2, 3, 4, 5, 678_901_000, time.UTC).UnixMicro()}
	events.Environment.Append([]byte("Test"))
	events.EventContext.Append([]byte("{}"))
	return sink.Batch{Token: fmt.Sprint("token-", id), Events: events}
}
