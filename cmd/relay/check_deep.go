package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/diehard-outbox/diehard/pkg/checkup"
	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
	"github.com/diehard-outbox/diehard/pkg/sink/conformance"
)

const (
	scratchTable = "scratch table"
	// caseTimeouts is the time limit of a case, in time limits of a database.
	caseTimeouts = 10
)

// runDeep creates a scratch table, runs the cases of package conformance, and drops the
// table, even after a failure or an interruption.
func (s *subject) runDeep(ctx context.Context, runner *checkup.Runner) error {
	scratch, err := clickhouse.OpenScratch(checkOptions(s.c, s.timeout))
	if err != nil {
		return err
	}
	defer scratch.Close()
	created := false
	runner.Run(ctx, checkup.Check{Name: scratchTable, Needs: []string{clickhouse.ConnectionCheck}, Run: func(ctx context.Context) (string, error) {
		created = true
		return s.createScratch(ctx, scratch)
	}})
	harness := scratch.Harness(s.timeout)
	lost := false // ClickHouse does not respond
	for _, c := range conformance.Cases() {
		runner.Run(ctx, checkup.Check{Name: c.Name, Needs: []string{scratchTable}, Run: func(ctx context.Context) (string, error) {
			if lost {
				return "", checkup.Skip("clickhouse does not respond")
			}
			err := s.runCase(ctx, c, harness)
			lost = err != nil && s.ping(ctx) != nil
			return "", err
		}})
	}
	if created {
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.timeout)
		defer cancel()
		runner.Run(bounded, checkup.Check{Name: scratchTable + " dropped", Run: func(ctx context.Context) (string, error) {
			return dropScratch(ctx, scratch)
		}})
	}
	return nil
}

func (s *subject) createScratch(ctx context.Context, scratch *clickhouse.Scratch) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	if err := scratch.Create(ctx); err != nil {
		return "", &checkup.ProblemError{
			Problem: err.Error(),
			Remedy:  "grant the user CREATE TABLE, DROP TABLE, ALTER TABLE, INSERT and SELECT on the database of the event log, or run the command as another user",
		}
	}
	return scratch.Tables()[0], nil
}

// runCase runs a case with a time limit.
func (s *subject) runCase(ctx context.Context, c conformance.Case, harness conformance.Harness) error {
	bounded, cancel := context.WithTimeout(ctx, caseTimeouts*s.timeout)
	defer cancel()
	err := c.Run(bounded, harness)
	if err == nil {
		return nil
	}
	if _, explained := errors.AsType[checkup.Remediable](err); explained {
		return err
	}
	if _, ok := err.(*sink.Error); ok { //nolint:errorlint // a wrapped error can be an unexpected result
		return &checkup.ProblemError{Problem: err.Error(), Remedy: "correct the cause and repeat the command: the test had no result"}
	}
	return &checkup.ProblemError{
		Problem: err.Error(),
		Remedy:  "deliver no events to this destination: it breaks a promise that the guarantee relies on (docs/delivery.md)",
	}
}

func (s *subject) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, min(s.timeout, time.Minute))
	defer cancel()
	return s.sink.Ping(ctx)
}

func dropScratch(ctx context.Context, scratch *clickhouse.Scratch) (string, error) {
	tables := scratch.Tables()
	if err := scratch.Drop(ctx); err != nil {
		return "", &checkup.ProblemError{
			Problem: fmt.Sprintf("the tables %s may still exist: %v", strings.Join(tables, " and "), err),
			Remedy:  strings.Join(scratch.DropStatements(), "; "),
		}
	}
	return tables[0], nil
}
