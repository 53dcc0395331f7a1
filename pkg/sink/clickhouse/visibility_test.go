package clickhouse_test

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

var _ = Describe("A presence check", func() {
	for _, protocol := range protocols {
		Context("over "+protocol, func() {
			DescribeTable("is not changed by the user's profile", func(ctx SpecContext, profile string) {
				db := newTable(ctx, protocol)
				settings, err := url.ParseQuery(profile)
				Expect(err).NotTo(HaveOccurred())
				var changes []func(*url.URL)
				for name := range settings {
					changes = append(changes, parameter(name, settings.Get(name)))
				}
				s := open(with(db.dsn, changes...))
				Expect(s.Check(ctx)).To(Succeed())
				stored, absent := events(9, march), events(9, march)
				Expect(open(db.dsn).Insert(ctx, batchOf(stored))).To(Succeed())
				Expect(s.Present(ctx, &stored.Keys)).To(HaveEach(true))
				Expect(s.Present(ctx, &absent.Keys)).To(HaveEach(false))
				Expect(s.InFlight(ctx, "unknown")).To(BeFalse())
			},
				Entry("that filters the table", `additional_table_filters={'event_log':'metadata_version = 2'}`),
				Entry("that filters system.parts", `additional_table_filters={'system.parts':'0'}`),
				Entry("that filters results", "additional_result_filter=0"),
				Entry("that limits results", "limit=1&offset=1"),
				Entry("that reads with FINAL", "final=1"),
				Entry("that bounds the rows that a query reads", "max_rows_to_read=1"),
				Entry("that bounds the bytes that a query reads", "max_bytes_to_read=1"),
				Entry("that bounds the rows that a server reads", "max_rows_to_read_leaf=1"),
				Entry("that cuts the rows that a query reads", "max_rows_to_read=1&read_overflow_mode=break"),
				Entry("that bounds a set", "max_rows_in_set=1"),
				Entry("that cuts a set", "max_rows_in_set=1&set_overflow_mode=break"),
				Entry("that bounds a set's bytes", "max_bytes_in_set=1"),
				Entry("that bounds a result", "max_result_rows=1&max_result_bytes=1"),
				Entry("that cuts a result", "max_result_bytes=1&result_overflow_mode=break"),
				Entry("that bounds groups", "max_rows_to_group_by=1"),
				Entry("that cuts groups", "max_rows_to_group_by=1&group_by_overflow_mode=any"),
				Entry("that bounds columns", "max_columns_to_read=1&max_temporary_columns=1&max_temporary_non_const_columns=1"),
				Entry("that bounds partitions", "max_partitions_to_read=1"),
				Entry("that bounds the length of a query", "max_query_size=300"),
				Entry("that bounds the elements of a query", "max_ast_elements=12&max_expanded_ast_elements=12"),
				Entry("that bounds the depth of a query", "max_ast_depth=5&max_subquery_depth=1"),
				Entry("that requires keys", "force_primary_key=1&force_index_by_date=1"),
				Entry("that requires projections", "force_optimize_projection=1"),
				Entry("that requires a speed", "min_execution_speed=1000000000&timeout_before_checking_execution_speed=0"),
				Entry("that returns nothing for an empty set", "empty_result_for_aggregation_by_empty_set=1"),
				Entry("that returns null for an empty set", "aggregate_functions_null_for_empty=1"),
			)

			It("sees an insert in flight that the user's profile hides", func(ctx SpecContext) {
				db := newTable(ctx, protocol)
				db.exec(ctx, "CREATE TABLE slow (n UInt8) ENGINE = Null")
				db.exec(ctx, "CREATE MATERIALIZED VIEW slowly TO slow AS SELECT sleep(1) AS n FROM event_log")
				s := open(with(db.dsn, parameter("additional_table_filters", `{'system.processes':'0'}`)))
				batch, done := oneEvent(), make(chan error, 1)
				go func() { done <- s.Insert(ctx, batch) }()
				Eventually(ctx, s.InFlight).WithArguments(batch.Token).WithTimeout(30 * time.Second).Should(BeTrue())
				Eventually(ctx, done).WithTimeout(30 * time.Second).Should(Receive(Succeed()))
			})

			It("finds a row that was deleted on purpose", func(ctx SpecContext) {
				db := newTable(ctx, protocol)
				s := open(db.dsn)
				stored, absent := events(9, march), events(3, march)
				Expect(s.Insert(ctx, batchOf(stored))).To(Succeed())
				db.exec(ctx, "SYSTEM START MERGES event_log") // a deletion is a mutation
				db.exec(ctx, "DELETE FROM event_log WHERE event_id = '"+stored.EventID[0].String()+"' SETTINGS lightweight_deletes_sync = 2")
				Expect(db.count(ctx)).To(Equal(uint64(8)))
				Expect(s.Present(ctx, &stored.Keys)).To(HaveEach(true))
				Expect(s.Present(ctx, &absent.Keys)).To(HaveEach(false))
			})
		})
	}

	DescribeTable("returns a blind error if a row policy hides", func(ctx SpecContext, visible string, isBlind bool) {
		db := newTable(ctx, "http")
		stored := events(9, march)
		Expect(open(db.dsn).Insert(ctx, batchOf(stored))).To(Succeed())
		_, dsn := db.hide(visible)
		s := open(dsn)
		absent := events(9, march)
		_, err := s.Present(ctx, &absent.Keys)
		if !isBlind {
			Expect(err).NotTo(HaveOccurred())
			return
		}
		blind := blindError(err)
		Expect(blind.Problem).To(And(ContainSubstring("`diehard`"), ContainSubstring("of 9 rows in the part 202603_1_1_0 of the table `event_log`")))
		Expect(blind.Remedy).To(ContainSubstring("CREATE ROW POLICY diehard ON `event_log` USING 1 TO `diehard`"))
	},
		Entry("all rows", "0", true),
		Entry("one row", "metadata_version != 4", true),
		Entry("rows by the month", "toYYYYMM(event_date_time) != 202603", true),
		Entry("rows of another month", "toYYYYMM(event_date_time) = 202603", false),
		Entry("no row", "1", false),
	)

	DescribeTable("compares only the parts that may contain the batch, with the partition key",
		func(ctx SpecContext, partitionBy string, compared int) {
			db := newDatabase(ctx, "http")
			db.exec(ctx, create(theColumns(), "ReplacingMergeTree "+partitionBy+theOrder+theSettings))
			db.exec(ctx, "ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 10000")
			s := open(db.dsn)
			Expect(s.Check(ctx)).To(Succeed())
			for _, month := range []time.Time{march, march.AddDate(0, 1, 0), march.AddDate(1, 0, 0)} {
				Expect(s.Insert(ctx, batchOf(events(5, month)))).To(Succeed())
			}
			g, dsn := db.hide("1")
			absent := events(5, march)
			Expect(open(dsn).Present(ctx, &absent.Keys)).To(HaveEach(false))
			counts := strings.Join(slices.DeleteFunc(g.Statements(), func(statement string) bool {
				return !strings.Contains(statement, "GROUP BY name)") || !strings.Contains(statement, "_part IN")
			}), "\n")
			Expect(counts).NotTo(BeEmpty())
			Expect(strings.Count(counts, "_0'")).To(Equal(compared), "parts")

			_, dsn = db.hide("toYear(event_date_time) != 2026")
			_, err := open(dsn).Present(ctx, &absent.Keys)
			Expect(blindError(err).Remedy).NotTo(BeEmpty())
		},
		Entry("of the migrations", "PARTITION BY toYYYYMM(event_date_time)", 1),
		Entry("of two expressions", "PARTITION BY (toYYYYMM(event_date_time), startsWith(event_type, 'a'))", 1),
		Entry("of a product", "PARTITION BY (toYear(event_date_time)) * (toMonth(event_date_time))", 1),
		Entry("of a text", "PARTITION BY formatDateTime(event_date_time, '%Y(%m')", 1),
		Entry("of the type and the time", "PARTITION BY (event_type, toYYYYMM(event_date_time))", 3),
		Entry("of another column", "PARTITION BY (environment, toYYYYMM(event_date_time))", 3),
		Entry("of a subcolumn", "PARTITION BY (toYYYYMM(event_date_time), event_context.size)", 3),
		Entry("that is missing", "", 3),
	)

	It("believes that events are absent from a partition that is empty, dropped or truncated", func(ctx SpecContext) {
		db := newTable(ctx, "http")
		_, dsn := db.hide("0")
		hiding, s := open(dsn), open(db.dsn)
		absent := events(3, march)
		Expect(hiding.Present(ctx, &absent.Keys)).To(HaveEach(false))
		stored := events(3, march)
		Expect(s.Insert(ctx, batchOf(stored))).To(Succeed())
		db.exec(ctx, "ALTER TABLE event_log DROP PARTITION 202603")
		Expect(hiding.Present(ctx, &stored.Keys)).To(HaveEach(false))
		Expect(s.Insert(ctx, batchOf(events(3, march)))).To(Succeed())
		db.exec(ctx, "TRUNCATE TABLE event_log")
		Expect(hiding.Present(ctx, &stored.Keys)).To(HaveEach(false))
	})

	It("compares the result of a merge that replaces parts during the check", func(ctx SpecContext) {
		db := newTable(ctx, "http")
		db.exec(ctx, "SYSTEM START MERGES event_log")
		s := open(db.dsn)
		for range 3 {
			Expect(s.Insert(ctx, batchOf(events(3, march)))).To(Succeed())
		}
		absent := events(3, march)
		g, dsn := db.hide("1")
		merge := sync.OnceFunc(func() { db.exec(ctx, "OPTIMIZE TABLE event_log FINAL") })
		g.Before(func(statement string) {
			defer GinkgoRecover()
			if strings.Contains(statement, "_part IN") {
				merge()
			}
		})
		Expect(open(dsn).Present(ctx, &absent.Keys)).To(HaveEach(false))
		Expect(strings.Join(g.Statements(), "\n")).To(ContainSubstring("_part IN ('202603_1_3_1"))

		By("hiding the merged part")
		_, dsn = db.hide("0")
		_, err := open(dsn).Present(ctx, &absent.Keys)
		Expect(blindError(err).Remedy).NotTo(BeEmpty())
	})

	It("continues if a partition is dropped during the check", func(ctx SpecContext) {
		db := newTable(ctx, "http")
		Expect(open(db.dsn).Insert(ctx, batchOf(events(3, march)))).To(Succeed())
		absent := events(3, march)
		g, dsn := db.hide("1")
		g.Before(func(statement string) {
			defer GinkgoRecover()
			if strings.Contains(statement, "_part IN") {
				db.exec(ctx, "ALTER TABLE event_log DROP PARTITION 202603")
			}
		})
		Expect(open(dsn).Present(ctx, &absent.Keys)).To(HaveEach(false))
	})

	It("queries again if a row policy was removed before the check", func(ctx SpecContext) {
		db := newTable(ctx, "http")
		stored := events(9, march)
		Expect(open(db.dsn).Insert(ctx, batchOf(stored))).To(Succeed())
		g, dsn := db.hide("0")
		g.Before(func(statement string) {
			if strings.Contains(statement, "system.parts") {
				g.Impose("")
			}
		})
		Expect(open(dsn).Present(ctx, &stored.Keys)).To(HaveEach(true))
	})

	It("requires a deduplication window for all partitions of the batch", func(ctx SpecContext) {
		db := newTable(ctx, "http")
		db.exec(ctx, "ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 1000")
		s := open(db.dsn)
		Expect(s.Check(ctx)).To(Succeed())
		absent := events(30, march)
		for i := range absent.EventDateTime {
			absent.EventDateTime[i] = march.AddDate(0, i, 0).UnixMicro()
		}
		_, err := s.Present(ctx, &absent.Keys)
		unfit := misconfigured(err)
		Expect(unfit.Problem).To(ContainSubstring("events of 30 partitions, and the table `event_log` remembers 1000 tokens"))
		db.exec(ctx, unfit.Remedy)
		Expect(s.Present(ctx, &absent.Keys)).To(HaveEach(false))
	})

	It("compares thousands of parts", func(ctx SpecContext) {
		db := newDatabase(ctx, "http")
		db.exec(ctx, create(theColumns(), "MergeTree PARTITION BY toYYYYMM(event_date_time) ORDER BY event_id"+theSettings))
		db.exec(ctx, "ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 10000")
		db.exec(ctx, "INSERT INTO event_log (event_id, event_date_time) SELECT generateUUIDv4(), addMonths(toDateTime64('1900-01-01 00:00:00', 6, 'UTC'), number)"+
			" FROM numbers(2500) SETTINGS max_partitions_per_insert_block = 0")
		absent := events(2500, time.Date(1900, 1, 1, 0, 0, 0, 0, time.UTC))
		for i := range absent.EventDateTime {
			absent.EventDateTime[i] = time.Date(1900, time.Month(1+i), 1, 0, 0, 0, 0, time.UTC).UnixMicro()
		}
		Expect(open(db.dsn).Present(ctx, &absent.Keys)).To(HaveEach(false))
		_, dsn := db.hide("toYear(event_date_time) != 2026")
		_, err := open(dsn).Present(ctx, &absent.Keys)
		Expect(blindError(err).Remedy).NotTo(BeEmpty())
	})
})

var _ = Describe("An event at the limits of the server's range of times", func() {
	for _, protocol := range protocols {
		It("is stored, found and in its partition over "+protocol, func(ctx SpecContext) {
			db := newTable(ctx, protocol)
			s := open(db.dsn)
			limits := events(3, march)
			limits.EventDateTime = []int64{
				time.Date(1, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro(),
				time.Date(2500, 6, 7, 8, 9, 10, 11_000, time.UTC).UnixMicro(),
				time.Date(9999, 12, 31, 23, 59, 59, 999_999_000, time.UTC).UnixMicro(),
			}
			Expect(s.Present(ctx, &limits.Keys)).To(HaveEach(false))
			Expect(s.Insert(ctx, batchOf(limits))).To(Succeed())
			Expect(s.Present(ctx, &limits.Keys)).To(HaveEach(true))
			stored, err := db.stored(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(stored.EventDateTime).To(ConsistOf(limits.EventDateTime))
			var partitions []string
			Expect(db.conn.QueryRow(ctx, "SELECT arraySort(groupArray(partition)) FROM system.parts"+
				" WHERE database = currentDatabase() AND table = 'event_log' AND active").Scan(&partitions)).To(Succeed())
			Expect(partitions).To(Equal([]string{"101", "250006", "999912"}))
		})
	}
})

var _ = Describe("A server of an older version, which holds fewer times", func() {
	It("finds the events that a newer version has stored, and stores no such event", func(ctx SpecContext) {
		db := newTable(ctx, "native")
		stored := events(4, march)
		stored.EventDateTime[0] = time.Date(500, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro()
		stored.EventDateTime[1] = time.Date(2500, 6, 7, 8, 9, 10, 11_000, time.UTC).UnixMicro()
		Expect(open(db.dsn).Insert(ctx, batchOf(stored))).To(Succeed())

		DeferCleanup(clickhouse.UseOldTimes())
		older := open(db.dsn)
		Expect(older.Present(ctx, &stored.Keys)).To(HaveEach(true))
		for i := range stored.EventID[:3] {
			stored.EventID[i] = uuid.New()
		}
		Expect(older.Present(ctx, &stored.Keys)).To(Equal([]bool{false, false, false, true}))
		_, bad := errors.AsType[*sink.BadEventsError](older.Insert(ctx, batchOf(stored)))
		Expect(bad).To(BeTrue())
	})
})

var march = time.Date(2026, 3, 5, 6, 7, 8, 0, time.UTC)

// events returns n events of different types at the time. Their versions are their
// indexes.
func events(n int, at time.Time) *sink.Events {
	e := &sink.Events{}
	for i := range n {
		e.EventID = append(e.EventID, uuid.New())
		e.EventType.Append(fmt.Appendf(nil, "type_'%d'", i%3))
		e.EventDateTime = append(e.EventDateTime, at.Add(time.Duration(i)*time.Microsecond).UnixMicro())
		e.Environment.Append([]byte("Test"))
		e.EventContext.Append([]byte("{}"))
		e.MetadataVersion = append(e.MetadataVersion, uint64(i))
	}
	return e
}

func batchOf(e *sink.Events) sink.Batch {
	return sink.Batch{Token: uuid.NewString(), Events: e}
}

func open(dsn string) *clickhouse.Sink {
	GinkgoHelper()
	return (&database{dsn: dsn}).open(clickhouse.Options{})
}

func blindError(err error) *sink.BlindError {
	GinkgoHelper()
	blind, ok := errors.AsType[*sink.BlindError](err)
	Expect(ok).To(BeTrue(), "%v", err)
	return blind
}
