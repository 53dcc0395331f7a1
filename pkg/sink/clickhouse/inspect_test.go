package clickhouse_test

import (
	"context"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/pkg/checkup"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

var _ = Describe("Checks", func() {
	run := func(ctx context.Context, s *clickhouse.Sink) (results []checkup.Result) {
		runner := &checkup.Runner{Report: func(result checkup.Result) { results = append(results, result) }}
		runner.Run(ctx, s.Checks(clickhouse.Load{FlushTimeout: 30 * time.Second, Linger: 250 * time.Millisecond})...)
		return results
	}

	for _, protocol := range protocols {
		It("pass over "+protocol+", and insert nothing", func(ctx SpecContext) {
			db := newTable(ctx, protocol)
			Expect(run(ctx, db.open(clickhouse.Options{}))).To(HaveEach(And(HaveField("Status", checkup.OK), HaveField("Remedy", BeEmpty()))))
			Expect(db.count(ctx)).To(BeZero())
			var parts uint64
			Expect(db.conn.QueryRow(ctx, "SELECT count() FROM system.parts WHERE database = currentDatabase() AND table = 'event_log'").Scan(&parts)).To(Succeed())
			Expect(parts).To(BeZero())
		})
	}

	DescribeTable("name the missing right:",
		func(ctx SpecContext, statement, name, problem, remedy string) {
			gateway, dsn := faults.StartGatewayTo(newTable(ctx, "http, uncompressed").dsn)
			gateway.Deny(statement)
			var failed []checkup.Result
			for _, result := range run(ctx, open(dsn)) {
				if result.Status == checkup.Failed {
					failed = append(failed, result)
				}
			}
			Expect(failed).To(HaveExactElements(And(
				HaveField("Name", name), HaveField("Detail", HavePrefix(problem)), HaveField("Remedy", remedy))))
			gateway.Deny("")
			Expect(run(ctx, open(dsn))).To(HaveEach(HaveField("Status", checkup.OK)))
		},
		Entry("INSERT on the table", "INSERT INTO", "clickhouse right to insert",
			"the clickhouse user may not insert: ", "GRANT INSERT ON `event_log` TO `diehard`"),
		Entry("SELECT on the table", "FROM `event_log`", "clickhouse right to check presence",
			"the clickhouse user may not execute a presence check: ", "GRANT SELECT ON `event_log` TO `diehard`; GRANT SELECT ON system.parts TO `diehard`"),
		Entry("SELECT on system.parts", "FROM system.parts", "clickhouse right to check presence",
			"the clickhouse user may not execute a presence check: ", "GRANT SELECT ON `event_log` TO `diehard`; GRANT SELECT ON system.parts TO `diehard`"),
		Entry("SELECT on system.processes", "FROM system.processes", "clickhouse right to see running inserts",
			"the clickhouse user may not read system.processes", "GRANT SELECT ON system.processes TO `diehard`"),
		Entry("every right", "SELECT", "clickhouse connection",
			"clickhouse at ", "grant the missing right to the user `diehard`"),
	)
})

var _ = Describe("A scratch table", func() {
	It("is dropped with its table of migrations, and counts no rows after a merge", func(ctx SpecContext) {
		db := newTable(ctx, "native")
		scratch, err := clickhouse.OpenScratch(clickhouse.Options{DSN: db.dsn})
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(scratch.Close)
		tables := func() (names []string) {
			GinkgoHelper()
			Expect(db.conn.QueryRow(ctx, "SELECT arraySort(groupArray(name)) FROM system.tables WHERE database = currentDatabase()").Scan(&names)).To(Succeed())
			return names
		}
		before := tables()
		Expect(scratch.Create(ctx)).To(Succeed())
		Expect(tables()).To(ConsistOf(append(scratch.Tables(), before...)))

		harness, batch := scratch.Harness(time.Minute), batchOf(events(2, march))
		ids := batch.Events.EventID
		Expect(harness.Sink.Insert(ctx, batch)).To(Succeed())
		Expect(harness.Stored(ctx, ids)).To(HaveField("EventID", ConsistOf(ids)))
		db.exec(ctx, "OPTIMIZE TABLE "+scratch.Tables()[0]+" FINAL")
		Expect(harness.Stored(ctx, ids)).Error().To(MatchError(ContainSubstring("a merge has changed the scratch table")))

		Expect(scratch.Drop(ctx)).To(Succeed())
		Expect(scratch.Drop(ctx)).To(Succeed())
		Expect(tables()).To(Equal(before))
	})
})
