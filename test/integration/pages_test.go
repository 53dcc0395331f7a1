package integration_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/test/system"
)

var sqlBlock = regexp.MustCompile("(?ms)^ *```sql\n(.*?);?\n *```$")

// sqlOf returns the SQL blocks of a page of docs.
func sqlOf(page string) (blocks []string) {
	GinkgoHelper()
	content, err := os.ReadFile(filepath.Join(root, "docs", page))
	Expect(err).NotTo(HaveOccurred())
	for _, block := range sqlBlock.FindAllStringSubmatch(string(content), -1) {
		blocks = append(blocks, block[1])
	}
	return blocks
}

var _ = Describe("The SQL of the documentation", func() {
	clickHouse := func(s *system.System) *sqlx.DB {
		GinkgoHelper()
		db, err := sqlx.Open("clickhouse", s.ClickHouse.Native)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(db.Close)
		return db
	}

	It("removes everything that the migrations created, except the event log", func(ctx SpecContext) {
		s := newSystem(ctx)
		sink := clickHouse(s)
		Expect(s.Publish(ctx, system.Event())).To(Succeed())

		blocks := sqlOf("leaving.md")
		var waiting struct {
			Events      int `db:"events"`
			Batches     int `db:"batches"`
			DeadLetters int `db:"dead_letters"`
		}
		Expect(s.Postgres.GetContext(ctx, &waiting, blocks[0])).To(Succeed())
		Expect(waiting.Events).To(Equal(1))

		for _, block := range blocks[1:] {
			db := s.Postgres
			if strings.Contains(block, "event_log") {
				db = sink
			}
			_, err := db.ExecContext(ctx, block)
			Expect(err).NotTo(HaveOccurred(), block)
		}
		var left []string
		Expect(s.Postgres.SelectContext(ctx, &left, `
			SELECT relname FROM pg_class
			WHERE relnamespace NOT IN ('pg_catalog'::regnamespace, 'pg_toast'::regnamespace, 'information_schema'::regnamespace)
			UNION ALL
			SELECT proname FROM pg_proc
			WHERE pronamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace)`)).To(Succeed())
		Expect(left).To(BeEmpty())
		Expect(sink.SelectContext(ctx, &left, "SHOW TABLES")).To(Succeed())
		Expect(left).To(ConsistOf("event_log"))
	})

	It("orders events, and counts each event once", func(ctx SpecContext) {
		s := newSystem(ctx)
		sink := clickHouse(s)
		exec := func(statement string) {
			GinkgoHelper()
			_, err := sink.ExecContext(ctx, statement)
			Expect(err).NotTo(HaveOccurred())
		}
		aMinuteAgo := time.Now().UTC().Add(-time.Minute).Truncate(time.Second).Format(time.DateTime)
		inserts := 0 // makes the rows of each insert unique, because ClickHouse drops an equal insert
		insert := func(id uuid.UUID, microsecond int, eventType string, version int) {
			GinkgoHelper()
			inserts++
			exec(fmt.Sprintf(`INSERT INTO event_log (event_id, event_type, event_date_time, environment, event_context)
				VALUES ('%s', '%s', '%s.%06d', 'Insert%d', '{"order_id":"42","version":%d}')`, id, eventType, aMinuteAgo, microsecond, inserts, version))
		}
		exec("CREATE TABLE copied_events (event_id UUID) ENGINE = MergeTree ORDER BY event_id")
		low, high, twice := uuid.MustParse("00000000-0000-4000-8000-000000000001"), uuid.MustParse("00000000-0000-4000-8000-000000000002"), uuid.New()
		insert(high, 5, "order_placed", 3)
		insert(low, 5, "order_placed", 2)
		insert(twice, 2, "order_placed", 1)
		insert(twice, 2, "order_placed", 1)
		insert(uuid.New(), 1, "order_shipped", 4)

		blocks := sqlOf("ordering.md")
		Expect(blocks).To(HaveLen(5))
		rows := func(query string) (rows []map[string]any) {
			GinkgoHelper()
			result, err := sink.QueryxContext(ctx, query)
			Expect(err).NotTo(HaveOccurred(), query)
			defer result.Close()
			for result.Next() {
				row := make(map[string]any)
				Expect(result.MapScan(row)).To(Succeed())
				rows = append(rows, row)
			}
			Expect(result.Err()).NotTo(HaveOccurred())
			return rows
		}
		contexts := func(versions ...int) (matchers []any) {
			for _, version := range versions {
				matchers = append(matchers, HaveKeyWithValue("event_context", fmt.Sprintf(`{"order_id":"42","version":%d}`, version)))
			}
			return matchers
		}

		By("sorting by time and id")
		Expect(rows(blocks[0])).To(HaveExactElements(contexts(1, 1, 2, 3)...))
		By("sorting by the publisher's own counter")
		Expect(rows(blocks[1])).To(HaveExactElements(contexts(1, 1, 2, 3, 4)...))
		By("reading new events")
		exec(fmt.Sprintf("INSERT INTO copied_events VALUES ('%s')", twice))
		Expect(rows(strings.ReplaceAll(blocks[2], "{last_read:DateTime64(6)}", "now()"))).To(HaveLen(3))
		By("finding duplicates")
		Expect(rows(blocks[3])).To(HaveExactElements(And(HaveKeyWithValue("rows", uint64(5)), HaveKeyWithValue("events", uint64(4)))))
		Expect(rows(blocks[4])).To(HaveExactElements(And(HaveKeyWithValue("event_id", twice.String()), HaveKeyWithValue("rows", uint64(2)))))
		Expect(rows("SELECT count() AS n FROM event_log FINAL")).To(HaveExactElements(HaveKeyWithValue("n", uint64(4))))
	})
})
