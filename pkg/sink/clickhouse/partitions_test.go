package clickhouse_test

import (
	"context"
	"slices"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

var _ = Describe("The partitions of events", func() {
	for _, protocol := range protocols {
		DescribeTable("are those of the table over "+protocol, func(ctx SpecContext, partitionBy string, partitions int) {
			db := newDatabase(ctx, protocol)
			db.exec(ctx, create(theColumns(), "ReplacingMergeTree "+partitionBy+theOrder+theSettings))
			s, spread := open(db.dsn), spreadEvents()
			numbers, err := s.Partitions(ctx, &spread.Keys)
			Expect(err).NotTo(HaveOccurred())
			Expect(s.Insert(ctx, batchOf(spread))).To(Succeed())
			Expect(groups(spread, numbers)).To(ConsistOf(db.stores(ctx)))
			Expect(groups(spread, numbers)).To(HaveLen(partitions))
		},
			Entry("by month", "PARTITION BY toYYYYMM(event_date_time)", 3),
			Entry("by type", "PARTITION BY event_type", 3),
			Entry("by type and month", "PARTITION BY (event_type, toYYYYMM(event_date_time))", 9),
			Entry("by a hash of the id", "PARTITION BY cityHash64(event_id) % 1", 1),
			Entry("by text", "PARTITION BY formatDateTime(event_date_time, '%Y(%m')", 3),
			Entry("by a constant", "PARTITION BY tuple()", 1),
			Entry("without a partition key", "", 1),
		)

		DescribeTable("are unknown over "+protocol+" if the partition depends on", func(ctx SpecContext, partitionBy string, columns ...string) {
			db := newDatabase(ctx, protocol)
			db.exec(ctx, create(theColumns(columns...), "ReplacingMergeTree "+partitionBy+theOrder+theSettings))
			spread := spreadEvents()
			numbers, err := open(db.dsn).Partitions(ctx, &spread.Keys)
			Expect(err).NotTo(HaveOccurred())
			Expect(groups(spread, numbers)).To(HaveLen(spread.Len()))
		},
			Entry("another column", "PARTITION BY (toYYYYMM(event_date_time), environment)"),
			Entry("a subcolumn", "PARTITION BY (toYYYYMM(event_date_time), event_context.size)"),
			Entry("a computed column", "PARTITION BY day", "day Date MATERIALIZED toDate(event_date_time)"),
			Entry("the server's time zone", "PARTITION BY toYYYYMM(event_date_time)", "event_date_time DateTime64(6)"),
		)
	}

	It("are calculated for an event that cannot be stored, and for many types", func(ctx SpecContext) {
		db := newDatabase(ctx, "http")
		db.exec(ctx, create(theColumns(), "ReplacingMergeTree PARTITION BY (event_type, toYYYYMM(event_date_time))"+theOrder+theSettings))
		many := events(3_001, march)
		many.EventType.Reset()
		for i := range many.Len() {
			many.EventType.Append([]byte(strings.Repeat("'", i%1_000)))
		}
		many.EventDateTime[2_500] = time.Date(10_000, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro()
		numbers, err := open(db.dsn).Partitions(ctx, &many.Keys)
		Expect(err).NotTo(HaveOccurred())
		for i, number := range numbers {
			if i == 2_500 {
				Expect(number).To(Equal(i))
			} else {
				Expect(number).To(Equal(i % 1_000))
			}
		}
	})

	It("is empty without events", func(ctx SpecContext) {
		Expect(open(newTable(ctx, "http").dsn).Partitions(ctx, &sink.Keys{})).To(BeEmpty())
	})
})

// spreadEvents returns events of three types in three months, two of each type in each
// month.
func spreadEvents() *sink.Events {
	spread := events(18, march)
	for i := range spread.EventDateTime {
		spread.EventDateTime[i] = march.AddDate(0, i/3%3, 0).UnixMicro()
	}
	return spread
}

// groups returns the ids of the events with equal numbers, in a sorted text for each
// number.
func groups(e *sink.Events, numbers []int) []string {
	GinkgoHelper()
	Expect(numbers).To(HaveLen(e.Len()))
	ids := map[int][]string{}
	for i, number := range numbers {
		ids[number] = append(ids[number], e.EventID[i].String())
	}
	var texts []string
	for _, group := range ids {
		slices.Sort(group)
		texts = append(texts, strings.Join(group, " "))
	}
	return texts
}

// stores returns the ids of the stored events, in a sorted text for each partition.
func (db *database) stores(ctx context.Context) (texts []string) {
	GinkgoHelper()
	Expect(db.conn.QueryRow(ctx, "SELECT groupArray(ids) FROM (SELECT arrayStringConcat(arraySort(groupArray(toString(event_id))), ' ') AS ids"+
		" FROM event_log GROUP BY _partition_id)").Scan(&texts)).To(Succeed())
	return texts
}
