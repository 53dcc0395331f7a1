// Testsummary reads Ginkgo's JSON reports of one or several runs and prints
// "N passed, N failed". It exits with 0 only if at least one spec ran and none
// failed.
//
// A failed suite without a failed spec, for example an empty suite or a timeout, counts
// as one failure. A run that failed for a reason outside the report, such as a compile
// error, counts as one failure too.
//
// With -left-out it prints only the reasons for skipped specs, one reason per line. It
// then exits with 0 even if specs failed.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/onsi/ginkgo/v2/types"
)

func main() {
	exitCode := flag.Int("exit-code", 0, "exit `code` of the test run that wrote the report")
	leftOut := flag.Bool("left-out", false, "print only the reasons for skipped specs")
	flag.Parse()

	if flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "usage: testsummary [-exit-code code | -left-out] report.json...")
		os.Exit(2)
	}

	reports, err := read(flag.Args())
	if *leftOut {
		printLeftOut(reports) // without a report the run has printed the reason
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testsummary:", err)
	}

	passed, failed := count(reports)
	if failed == 0 && (err != nil || *exitCode != 0) {
		failed = 1
	}

	fmt.Fprintf(os.Stdout, "%d passed, %d failed\n", passed, failed)

	if passed == 0 || failed > 0 {
		os.Exit(1)
	}
}

func printLeftOut(reports []types.Report) {
	specs := map[string]int{}
	for i := range reports {
		for j := range reports[i].SpecReports {
			spec := &reports[i].SpecReports[j]
			// Specs that were not selected are skipped too, without a message.
			if spec.State == types.SpecStateSkipped && spec.Failure.Message != "" {
				specs[strings.Join(strings.Fields(spec.Failure.Message), " ")]++
			}
		}
	}
	for _, reason := range slices.Sorted(maps.Keys(specs)) {
		fmt.Fprintf(os.Stdout, "left out %d specs: %s\n", specs[reason], reason)
	}
}

func read(paths []string) (all []types.Report, err error) {
	for _, path := range paths {
		reports, readErr := readReport(path)
		all, err = append(all, reports...), errors.Join(err, readErr)
	}
	return all, err
}

func readReport(path string) ([]types.Report, error) {
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("missing report of the test run")
	}

	if err != nil {
		return nil, fmt.Errorf("read the report: %w", err)
	}

	var reports []types.Report
	if err := json.Unmarshal(content, &reports); err != nil {
		return nil, fmt.Errorf("decode the report: %w", err)
	}

	return reports, nil
}

func count(reports []types.Report) (passed, failed int) {
	for i := range reports {
		suite := &reports[i]
		specs := suite.SpecReports.WithLeafNodeType(types.NodeTypeIt)
		passed += specs.CountWithState(types.SpecStatePassed)

		failures := suite.SpecReports.CountWithState(types.SpecStateFailureStates)
		if !suite.SuiteSucceeded && failures == 0 {
			failures = 1
		}

		failed += failures
	}

	return passed, failed
}
