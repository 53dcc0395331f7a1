// Package model_test runs a model checker over the delivery protocol. The checker
// visits every order of steps.
package model_test

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/needs"
)

func TestModel(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "model")
}

//go:embed delivery.pml
var model string

// bounds are the bounds of a run: the number of faults and of PostgreSQL's failovers,
// which data are invalid, and how ClickHouse stores events.
type bounds struct {
	faults, failovers int
	poison            int // the events that ClickHouse refuses, one bit each
	suspect           int // 1 if workers may suspect the data of a batch
	sour              int // the events whose inserts fail without a cause, one bit each
	operator          int // 1 if an operator mends the cause of sour, and requeues dead letters
	layout            int // which events share a partition, see delivery.pml
	replicated        bool
}

func (b bounds) definitions() []string {
	d := []string{
		fmt.Sprint("FAULTS=", b.faults), fmt.Sprint("FAILOVERS=", b.failovers), fmt.Sprint("POISON=", b.poison),
		fmt.Sprint("SUSPECT=", b.suspect), fmt.Sprint("SOUR=", b.sour), fmt.Sprint("OPERATOR=", b.operator), fmt.Sprint("LAYOUT=", b.layout),
	}
	if b.replicated {
		d = append(d, "REPLICATED")
	}
	return d
}

func (b bounds) String() string {
	return strings.ToLower(strings.NewReplacer("=", " ").Replace(strings.Join(b.definitions(), ", ")))
}

// spin is the path of the checker.
const spin = "../../bin/tools/spin"

// noSpin is the reason why the checker is missing, or empty.
var noSpin string

var _ = SynchronizedBeforeSuite(func(ctx SpecContext) []byte {
	output, err := exec.CommandContext(ctx, "./fetch-spin.sh", spin).CombinedOutput()
	if err == nil {
		return nil
	}
	Expect(ctx.Err()).NotTo(HaveOccurred())
	_, _ = GinkgoWriter.Write(output)
	lines := strings.Split(strings.TrimSpace(string(output)), "\n")
	return []byte(lines[len(lines)-1])
}, func(reason []byte) {
	noSpin = string(reason)
})

// An optimized checker takes seconds longer to compile. The model needs it only for a
// search of millions of states.
const (
	optimized   = "-O1"
	unoptimized = "-O0"
)

// check returns the output of the checker for the model with these definitions.
func check(ctx context.Context, b bounds, optimization string, definitions ...string) string {
	GinkgoHelper()
	if noSpin != "" {
		needs.LeaveOut(noSpin)
	}
	compiler := needs.Compiler()
	checker, err := filepath.Abs(spin)
	Expect(err).NotTo(HaveOccurred())
	dir := GinkgoT().TempDir()
	source := filepath.Join(dir, "delivery.pml")
	Expect(os.WriteFile(source, []byte(model), 0o600)).To(Succeed())
	var args []string
	for _, d := range append(b.definitions(), definitions...) {
		args = append(args, "-D"+d)
	}
	run := func(program string, args ...string) string {
		cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // the checker, the compiler and their output
		cmd.Dir = dir
		output, err := cmd.CombinedOutput()
		Expect(err).NotTo(HaveOccurred(), "%s %v: %s", program, args, output)
		return string(output)
	}
	run(checker, append(args, "-a", source)...)
	// SAFETY skips the search for cycles, because every run of the model ends.
	run(compiler, "-w", optimization, "-DSAFETY", "-DCOLLAPSE", "-DMEMLIM=4096", "-o", "pan", "pan.c")
	return run(filepath.Join(dir, "pan"), "-m100000")
}

// mutants are variants of the model. Each mutant lacks one safeguard of the protocol.
var mutants = []struct {
	name   string
	bounds bounds
}{
	{"SEND_BEFORE_THE_CUT", bounds{faults: 1}},
	{"MARK_AFTER_THE_SEND", bounds{faults: 1}},
	{"LEASE_WITHOUT_THE_MARK", bounds{faults: 1}},
	{"LEASE_ACROSS_A_FAILOVER", bounds{faults: 1, failovers: 1}},
	{"TRUST_A_FAILOVER", bounds{faults: 1, failovers: 1}},
	{"NEW_TOKEN_ON_RESEND", bounds{faults: 1}},
	{"NEW_TOKEN_FOR_THE_REST", bounds{faults: 1}},
	{"CUT_ANEW", bounds{faults: 1}},
	{"CHECK_WITHOUT_WAITING", bounds{faults: 1}},
	{"CONVICT_WITHOUT_CHECKING", bounds{faults: 1}},
	{"SETTLE_A_RESEND", bounds{faults: 1}},
	{"BELIEVE_A_REPLICA", bounds{faults: 1, replicated: true}},
	{"SAMPLE_A_RECENT_BATCH", bounds{faults: 2, suspect: 1, layout: 1, replicated: true}},
	{"BELIEVE_A_REPLICA_AFTER_A_SAMPLE", bounds{faults: 1, suspect: 1, replicated: true}},
	{"SPLIT_BEFORE_THE_SAMPLE", bounds{faults: 1, suspect: 1, layout: 1}},
	{"SPLIT_ANOTHER_PARTITION", bounds{faults: 1, suspect: 1, layout: 2}},
	{"REQUEUE_UNDER_A_NEW_TOKEN", bounds{faults: 1, suspect: 1, sour: 0b01, operator: 1}},
	{"REQUEUE_AS_A_FIRST_ATTEMPT", bounds{faults: 1, suspect: 1, sour: 0b01, operator: 1}},
	{"COVER_WITHOUT_AN_ACKNOWLEDGEMENT", bounds{faults: 1, suspect: 1, layout: 1}},
	{"COVER_WITHOUT_WAITING", bounds{faults: 1, suspect: 1, layout: 1}},
}

var _ = Describe("The model of the delivery protocol", func() {
	for _, c := range []struct {
		bounds

		labels Labels
	}{
		{bounds{faults: 2}, Label("long")},
		{bounds{faults: 2, poison: 0b01}, Label("long")},
		{bounds{faults: 1, poison: 0b11}, nil},
		{bounds{failovers: 1}, nil},
		{bounds{faults: 1, replicated: true}, nil},
		{bounds{faults: 1, poison: 0b01, replicated: true}, nil},
		{bounds{faults: 2, replicated: true}, Label("long")},
		{bounds{faults: 1, suspect: 1, layout: 1, replicated: true}, nil},
		{bounds{faults: 2, suspect: 1, replicated: true}, Label("long")},
		{bounds{faults: 2, suspect: 1, layout: 1, replicated: true}, Label("long")},
		{bounds{faults: 1, failovers: 1}, Label("long")},
		{bounds{failovers: 2, poison: 0b01}, Label("long")},
		{bounds{faults: 1, suspect: 1, layout: 1}, nil},
		{bounds{faults: 1, suspect: 1, sour: 0b01, layout: 1}, nil},
		{bounds{suspect: 1, sour: 0b01, operator: 1, layout: 1}, nil},
		{bounds{suspect: 1, sour: 0b01, operator: 1, layout: 2}, nil},
		{bounds{faults: 2, suspect: 1, layout: 1}, Label("long")},
		{bounds{faults: 1, suspect: 1, layout: 2}, Label("long")},
		{bounds{faults: 1, suspect: 1, sour: 0b01, operator: 1}, Label("long")},
		{bounds{faults: 1, suspect: 1, sour: 0b01, operator: 1, layout: 1}, Label("long")},
		{bounds{faults: 1, suspect: 1, sour: 0b11, operator: 1, layout: 1}, Label("long")},
	} {
		b := c.bounds
		It("holds in every order of steps with "+b.String(), c.labels, func(ctx SpecContext) {
			optimization := unoptimized
			if len(c.labels) > 0 {
				optimization = optimized
			}
			said := check(ctx, b, optimization)
			Expect(said).To(ContainSubstring("errors: 0\n"))
			Expect(said).NotTo(Or(ContainSubstring("Search not completed"), ContainSubstring("max search depth")))
			AddReportEntry(b.String(), regexp.MustCompile(`.*states, stored`).FindString(said))
		})
	}

	for _, mutant := range mutants {
		It("finds a violation without a safeguard: "+mutant.name, func(ctx SpecContext) {
			said := check(ctx, mutant.bounds, unoptimized, "MUTANT_"+mutant.name)
			Expect(said).To(ContainSubstring("errors: 1\n"))
			Expect(said).To(ContainSubstring("assertion violated"))
			AddReportEntry(mutant.name, regexp.MustCompile(`assertion violated.*`).FindString(said))
		})
	}

	It("runs every mutant of the model", func() {
		var run []string
		for _, mutant := range mutants {
			run = append(run, "MUTANT_"+mutant.name)
		}
		for _, named := range regexp.MustCompile(`MUTANT_\w+`).FindAllString(model, -1) {
			Expect(run).To(ContainElement(named))
		}
	})
})
