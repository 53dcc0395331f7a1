// Package chaos_test injects faults into everything that delivery depends on,
// one at a time and many at once. It expects every event in ClickHouse once.
package chaos_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

func TestChaos(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyPollingInterval(system.Polling)
	RunSpecs(t, "chaos")
}

var suite = testengines.Start(testengines.Options{Postgres: true, ClickHouse: true, Prepare: programs.Build("-tags=failpoints")})

// patience limits the wait for an expected effect.
const patience = system.Patience

func newSystem(ctx context.Context) *system.System {
	GinkgoHelper()
	return system.New(suite.Prepared(), suite.PostgresDSN(ctx), suite.ClickHouseDSNs(ctx))
}

// outcome is a spec's contribution to a row of the table in docs/delivery.md.
type outcome struct {
	Fault     string        `json:"fault"`
	Done      string        `json:"done"` // the place, the number of times or the situation
	Events    int           `json:"events"`
	Lost      int           `json:"lost"`
	Doubled   int           `json:"doubled"`
	Dead      int           `json:"dead"`
	Recovered time.Duration `json:"recovered"`
}

const outcomes = "outcome of a fault"

// expectOnce checks the figure of the backlog, and waits until the outbox is empty. It expects every event of o in ClickHouse
// once, except for dead letters. Then it records the outcome.
func expectOnce(ctx context.Context, s *system.System, o outcome) {
	GinkgoHelper()
	expectBacklog(ctx, s)
	healed := time.Now()
	s.AwaitEmpty(ctx)
	o.Recovered = time.Since(healed)
	_, _, dead := s.Left(Default)
	rows, distinct := s.Arrived(ctx, Default)
	var merged int
	Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT countIf(min_block_number != max_block_number) FROM system.parts "+
		"WHERE database = currentDatabase() AND table = 'event_log' AND active AND engine = 'ReplacingMergeTree'", &merged)).To(Succeed())
	Expect(merged).To(BeZero(), "a merge may have hidden a duplicate")
	expected := o.Events - o.Dead
	o.Lost, o.Doubled = expected-distinct, rows-distinct
	encoded, err := json.Marshal(o) // Ginkgo transfers text between its processes
	Expect(err).NotTo(HaveOccurred())
	AddReportEntry(outcomes, ReportEntryVisibilityNever, string(encoded))
	Expect(distinct).To(Equal(expected), "distinct events in ClickHouse")
	Expect(rows).To(Equal(expected), "rows in ClickHouse")
	Expect(dead).To(Equal(o.Dead), "dead letters")
}

// The marks around the table of outcomes.
const (
	outcomesBegin = "<!-- outcomes -->\n"
	outcomesEnd   = "<!-- /outcomes -->"
)

var _ = ReportAfterSuite("the outcomes of the faults", func(report Report) {
	path := os.Getenv("DIEHARD_CHAOS_OUTCOMES")
	if path == "" {
		return
	}
	content, err := os.ReadFile(path)
	Expect(err).NotTo(HaveOccurred())
	before, rest, found := strings.Cut(string(content), outcomesBegin)
	Expect(found).To(BeTrue(), "%s has no %s", path, outcomesBegin)
	_, after, found := strings.Cut(rest, outcomesEnd)
	Expect(found).To(BeTrue(), "%s has no %s", path, outcomesEnd)
	Expect(os.WriteFile(path, []byte(before+outcomesBegin+table(report)+outcomesEnd+after), 0o644)).To(Succeed()) //nolint:gosec // not a secret
})

// table returns the table of outcomes. A row is the sum of the outcomes with the same
// fault and situation.
func table(report Report) string {
	sums := map[[2]string]*outcome{}
	runs := map[[2]string]int{}
	for i := range report.SpecReports {
		for _, entry := range report.SpecReports[i].ReportEntries {
			if entry.Name != outcomes {
				continue
			}
			var o outcome
			Expect(json.Unmarshal([]byte(entry.StringRepresentation()), &o)).To(Succeed())
			key := [2]string{o.Fault, o.Done}
			if sums[key] == nil {
				sums[key] = &outcome{}
			}
			sum := sums[key]
			runs[key]++
			sum.Events += o.Events
			sum.Lost += o.Lost
			sum.Doubled += o.Doubled
			sum.Dead += o.Dead
			sum.Recovered = max(sum.Recovered, o.Recovered)
		}
	}
	var rows strings.Builder
	rows.WriteString("| fault | what was done | times | events | lost | doubled | dead letters | time to recover |\n")
	rows.WriteString("| --- | --- | --: | --: | --: | --: | --: | --: |\n")
	keys := slices.SortedFunc(maps.Keys(sums), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) })
	for _, key := range keys {
		sum := sums[key]
		fmt.Fprintf(&rows, "| %s | %s | %d | %d | %d | %d | %d | %.1f s |\n", key[0], key[1], runs[key],
			sum.Events, sum.Lost, sum.Doubled, sum.Dead, sum.Recovered.Seconds())
	}
	return rows.String()
}
