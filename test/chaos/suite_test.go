// Package chaos_test breaks everything that delivery depends on, one thing at a
// time and many at once, and expects every event in ClickHouse once.
package chaos_test

import (
	"context"
	"encoding/json"
	"os"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/test/engines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

func TestChaos(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "chaos")
}

var suite = engines.Start(engines.Options{ClickHouse: true, Prepare: programs.Build("-tags=failpoints")})

// patience is how long a spec waits for what must happen.
const patience = system.Patience

func newSystem(ctx context.Context) *system.System {
	GinkgoHelper()
	return system.New(suite.Prepared(), suite.PostgresDSN(ctx), suite.ClickHouseDSNs(ctx))
}

// outcome is a row of the table in docs/delivery.md.
type outcome struct {
	Fault     string        `json:"fault"`
	Done      string        `json:"done"`
	Events    int           `json:"events"`
	Lost      int           `json:"lost"`
	Doubled   int           `json:"doubled"`
	Dead      int           `json:"dead"`
	Recovered time.Duration `json:"recovered"`
}

const outcomes = "outcome of a fault"

// expectOnce waits until the outbox is empty, and expects every event of o in
// ClickHouse once, except for its dead ones. It records what it found.
func expectOnce(ctx context.Context, s *system.System, o outcome) {
	GinkgoHelper()
	healed := time.Now()
	s.AwaitEmpty(ctx)
	o.Recovered = time.Since(healed)
	_, _, dead := s.Left(Default)
	rows, distinct := s.Arrived(ctx, Default)
	var merged int
	Expect(engines.Scan(ctx, s.ClickHouse.HTTP, "SELECT countIf(min_block_number != max_block_number) FROM system.parts "+
		"WHERE database = currentDatabase() AND table = 'event_log' AND active", &merged)).To(Succeed())
	Expect(merged).To(BeZero(), "a merge may have hidden an event that was there twice")
	expected := o.Events - o.Dead
	o.Lost, o.Doubled = expected-distinct, rows-distinct
	AddReportEntry(outcomes, ReportEntryVisibilityNever, o)
	Expect(distinct).To(Equal(expected), "distinct events in ClickHouse")
	Expect(rows).To(Equal(expected), "rows in ClickHouse")
	Expect(dead).To(Equal(o.Dead), "dead letters")
}

var _ = ReportAfterSuite("the outcomes of the faults", func(report Report) {
	path := os.Getenv("DIEHARD_CHAOS_OUTCOMES")
	if path == "" {
		return
	}
	var all []outcome
	for _, spec := range report.SpecReports {
		for _, entry := range spec.ReportEntries {
			if entry.Name != outcomes {
				continue
			}
			var o outcome
			Expect(json.Unmarshal([]byte(entry.Value.AsJSON), &o)).To(Succeed())
			all = append(all, o)
		}
	}
	encoded, err := json.Marshal(all)
	Expect(err).NotTo(HaveOccurred())
	Expect(os.WriteFile(path, encoded, 0o644)).To(Succeed()) //nolint:gosec // nothing secret
})
