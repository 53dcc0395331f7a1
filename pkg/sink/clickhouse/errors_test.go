package clickhouse_test

import (
	"crypto/rand"
	"net/http"
	"net/url"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
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
			Entry("too little memory for the insert", sink.TooLarge, "the statement needs more memory than max_memory_usage",
				[]func(*url.URL){parameter("max_memory_usage", "1"), parameter("max_untracked_memory", "0")}),
			// Queries of other specs share the user's limit.
			Entry("too little memory for the user", Serial, sink.Overloaded, "short of memory",
				[]func(*url.URL){parameter("max_memory_usage_for_user", "1"), parameter("max_untracked_memory", "0")}),
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

		It("is too large for the memory of an insert over "+protocol+", and smaller inserts are not", func(ctx SpecContext) {
			db := newTable(ctx, protocol)
			s := open(with(db.dsn, parameter("max_memory_usage", "20000000")))
			err := s.Insert(ctx, batchOf(withContexts(40, 1<<20)))
			Expect(sink.ClassOf(err)).To(Equal(sink.TooLarge), "%v", err)
			Expect(s.Insert(ctx, batchOf(withContexts(1, 1<<20)))).To(Succeed())
			Expect(db.count(ctx)).To(Equal(uint64(1)))
		})
	}

	for _, protocol := range []string{"http", "http, uncompressed"} {
		DescribeTable("by a proxy has the class of the status over "+protocol, func(ctx SpecContext, status int, expected sink.Class) {
			db := newTable(ctx, protocol)
			g, dsn := faults.StartGatewayTo(db.dsn)
			s := open(dsn)
			g.Refuse(status, 1<<20)
			err := s.Insert(ctx, batchOf(withContexts(40, 1<<20)))
			Expect(sink.ClassOf(err)).To(Equal(expected), "%v", err)
			Expect(err).To(MatchError(ContainSubstring("HTTP %d", status)))
			Expect(s.Insert(ctx, oneEvent())).To(Succeed())
			Expect(db.count(ctx)).To(Equal(uint64(1)))
		},
			Entry("413", http.StatusRequestEntityTooLarge, sink.TooLarge),
			Entry("411", http.StatusLengthRequired, sink.Unavailable),
			Entry("414", http.StatusRequestURITooLong, sink.Unavailable),
			Entry("431", http.StatusRequestHeaderFieldsTooLarge, sink.Unavailable),
			Entry("502", http.StatusBadGateway, sink.Unavailable),
			Entry("507", http.StatusInsufficientStorage, sink.Unavailable),
			Entry("500", http.StatusInternalServerError, sink.Unknown),
		)
	}

	It("by the size limit of a proxy is not too large if it is a presence check", func(ctx SpecContext) {
		g, dsn := faults.StartGatewayTo(newTable(ctx, "http, uncompressed").dsn)
		s, many := open(dsn), events(1_000, march)
		Expect(s.Present(ctx, &many.Keys)).To(HaveEach(false))
		g.Refuse(http.StatusRequestEntityTooLarge, 10_000)
		_, err := s.Present(ctx, &many.Keys)
		Expect(sink.ClassOf(err)).To(Equal(sink.Unknown), "%v", err)
	})
})

// withContexts returns n events whose contexts have a number of bytes and do not compress.
func withContexts(n, size int) *sink.Events {
	e := events(n, march)
	e.EventContext.Reset()
	for range n {
		noise := make([]byte, size)
		_, _ = rand.Read(noise) // never fails
		e.EventContext.Append(noise)
	}
	return e
}
