package clickhouse_test

import (
	"net/url"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

// The class decides how the relay continues. It splits the batch after a permanent error,
// and the fleet slows down after an overload error.
var _ = Describe("An insert that the server refuses", func() {
	for _, protocol := range protocols {
		DescribeTable("has the class of its cause over "+protocol,
			func(ctx SpecContext, expected sink.Class, said string, changes []func(*url.URL), statements ...string) {
				db := newTable(ctx, protocol)
				for _, statement := range statements {
					db.exec(ctx, statement)
				}
				s, err := clickhouse.Open(clickhouse.Options{DSN: with(db.dsn, changes...)})
				Expect(err).NotTo(HaveOccurred())
				DeferCleanup(s.Close)
				err = s.Insert(ctx, oneEvent())
				Expect(err).To(MatchError(ContainSubstring(said)))
				Expect(sink.ClassOf(err)).To(Equal(expected))
			},
			Entry("too little memory", sink.Overloaded, "short of memory",
				[]func(*url.URL){parameter("max_memory_usage", "1"), parameter("max_untracked_memory", "0")}),
			Entry("too many parts", sink.Overloaded, "merges do not keep up", nil,
				"INSERT INTO event_log (event_id) VALUES (generateUUIDv4())",
				"ALTER TABLE event_log MODIFY SETTING parts_to_delay_insert = 0, parts_to_throw_insert = 1"),
			Entry("a missing table", sink.Unavailable, "the table is missing", nil, "DROP TABLE event_log"),
			Entry("a missing column", sink.Unavailable, "lacks a column", nil, "ALTER TABLE event_log DROP COLUMN environment"),
			Entry("a row that violates a constraint of the table", sink.Permanent, "violates a CHECK constraint", nil,
				"ALTER TABLE event_log ADD CONSTRAINT never CHECK 0"),
			Entry("an operator's view that throws", sink.Unknown, "", nil,
				"CREATE TABLE other (n UInt8) ENGINE = Null",
				"CREATE MATERIALIZED VIEW throws TO other AS SELECT throwIf(1) AS n FROM event_log"),
		)
	}
})
