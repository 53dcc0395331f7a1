package checkup_test

import (
	"context"
	"errors"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/checkup"
)

func TestCheckup(t *testing.T) {
	t.Parallel()
	RegisterFailHandler(Fail)
	RunSpecs(t, "checkup")
}

var _ = Describe("A runner", func() {
	var (
		results []checkup.Result
		runner  *checkup.Runner
	)
	BeforeEach(func() {
		results = nil
		runner = &checkup.Runner{Report: func(result checkup.Result) { results = append(results, result) }}
	})

	finding := func(name, detail string, err error, needs ...string) checkup.Check {
		return checkup.Check{Name: name, Needs: needs, Run: func(context.Context) (string, error) { return detail, err }}
	}

	It("continues after a problem, and skips only the checks that need it, also indirectly", func(ctx SpecContext) {
		runner.Run(ctx,
			finding("connection", "", errors.New("connection refused")),
			finding("table", "", nil, "connection"),
			finding("columns", "", nil, "table"),
			finding("configuration", "valid", nil))
		runner.Run(ctx, finding("both", "", nil, "configuration", "columns"))
		Expect(results).To(Equal([]checkup.Result{
			{Name: "connection", Status: checkup.Failed, Detail: "connection refused"},
			{Name: "table", Status: checkup.Skipped, Detail: "connection has failed"},
			{Name: "columns", Status: checkup.Skipped, Detail: "connection has failed"},
			{Name: "configuration", Status: checkup.OK, Detail: "valid"},
			{Name: "both", Status: checkup.Skipped, Detail: "connection has failed"},
		}))
		Expect(runner.Count(checkup.Failed)).To(Equal(1))
		Expect(runner.Count(checkup.Skipped)).To(Equal(3))
		Expect(runner.Count(checkup.Warning)).To(BeZero())
	})

	It("reports each problem of a check with its remedy, or with the remedy of the check", func(ctx SpecContext) {
		runner.Run(ctx, checkup.WithRemedy("read the log", []checkup.Check{finding("rights", "", errors.Join(
			&checkup.ProblemError{Problem: "no right to insert", Remedy: "GRANT INSERT"},
			errors.New("unknown"),
		))})...)
		Expect(results).To(Equal([]checkup.Result{
			{Name: "rights", Status: checkup.Failed, Detail: "no right to insert", Remedy: "GRANT INSERT"},
			{Name: "rights", Status: checkup.Failed, Detail: "unknown", Remedy: "read the log"},
		}))
	})

	It("runs the checks that need a check with a warning", func(ctx SpecContext) {
		runner.Run(ctx,
			finding("window", "", checkup.Warn("the window is small", "ALTER TABLE")),
			finding("insert", "allowed", nil, "window"))
		Expect(results).To(Equal([]checkup.Result{
			{Name: "window", Status: checkup.Warning, Detail: "the window is small", Remedy: "ALTER TABLE"},
			{Name: "insert", Status: checkup.OK, Detail: "allowed"},
		}))
	})

	It("skips a check that says so, and the checks that need it", func(ctx SpecContext) {
		runner.Run(ctx, finding("rights", "", checkup.Skip("no table")), finding("insert", "", nil, "rights"))
		Expect(results).To(Equal([]checkup.Result{
			{Name: "rights", Status: checkup.Skipped, Detail: "no table"},
			{Name: "insert", Status: checkup.Skipped, Detail: "rights was skipped"},
		}))
	})

	It("skips all other checks after an interruption, but not after a timeout", func(ctx SpecContext) {
		interrupted, interrupt := context.WithCancel(ctx)
		runner.Run(interrupted, checkup.Check{Name: "first", Run: func(context.Context) (string, error) {
			interrupt()
			return "", interrupted.Err()
		}}, finding("second", "", nil))
		late, cancel := context.WithTimeout(ctx, 0)
		defer cancel()
		runner.Run(late, finding("third", "", late.Err()))
		Expect(results).To(Equal([]checkup.Result{
			{Name: "first", Status: checkup.Skipped, Detail: "interrupted"},
			{Name: "second", Status: checkup.Skipped, Detail: "interrupted"},
			{Name: "third", Status: checkup.Failed, Detail: "context deadline exceeded"},
		}))
	})
})
