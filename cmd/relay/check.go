package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/spf13/pflag"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/checkup"
	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

const defaultCheckTimeout = 10 * time.Second

func check() cli.Command[*config.Relay] {
	var (
		timeout      time.Duration
		deep, asJSON bool
	)
	return cli.Command[*config.Relay]{
		Name:  "check",
		Short: "Check the configuration, PostgreSQL and ClickHouse before a deployment",
		Long: "The command prints one line for each check, and the remedy for each problem. It continues after\n" +
			"a problem, and skips only the checks that depend on it. It changes nothing.\n\n" +
			"With --deep, it also creates a scratch table beside the event log, tests the behaviour of\n" +
			"ClickHouse with it, and drops it. The event log and the outbox stay unchanged. The test takes\n" +
			"about a minute. Its user needs the rights CREATE TABLE, DROP TABLE and ALTER TABLE.",
		AddFlags: func(flags *pflag.FlagSet) {
			flags.BoolVar(&deep, "deep", false, "test the behaviour of ClickHouse with a scratch table")
			flags.DurationVar(&timeout, "timeout", defaultCheckTimeout, "time limit for the checks of each database; each test of --deep has ten times as long")
			flags.BoolVar(&asJSON, "json", false, jsonUsage)
		},
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			if timeout <= 0 {
				return cli.UsageError("--timeout is %s, must be positive", timeout)
			}
			subject, err := openSubject(c, p, timeout)
			if err != nil {
				return err
			}
			defer subject.close()
			report := &report{w: p.Out, json: asJSON, width: subject.width()}
			runner := &checkup.Runner{Report: report.write}
			subject.run(ctx, runner)
			if deep {
				if err := subject.runDeep(ctx, runner); err != nil {
					return err
				}
			}
			return report.end(ctx, runner)
		},
	}
}

// subject is what the command checks.
type subject struct {
	c       *config.Relay
	timeout time.Duration
	db      *sqlx.DB
	store   *store.Store
	sink    *clickhouse.Sink
}

func openSubject(c *config.Relay, p cli.Process, timeout time.Duration) (*subject, error) {
	db, err := postgres.Open(postgres.Options{
		DSN:             c.Postgres.DSN,
		PasswordFile:    c.Postgres.PasswordFile,
		MaxOpenConns:    1,
		ApplicationName: "diehard-check",
		Session:         store.Session(c.Relay.FlushTimeout),
		Log:             p.Log,
	})
	if err != nil {
		return nil, err
	}
	sink, err := clickhouse.Open(checkOptions(c, timeout))
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return &subject{c: c, timeout: timeout, db: db, store: store.New(db, storeOptions(c)), sink: sink}, nil
}

func checkOptions(c *config.Relay, timeout time.Duration) clickhouse.Options {
	o := sinkOptions(c)
	o.MaxDialTimeout = timeout
	return o
}

func (s *subject) close() {
	_ = s.db.Close()
	_ = s.sink.Close()
}

// Names of the checks that other checks need.
const (
	postgresConnection = "postgresql connection"
	postgresSchema     = "postgresql schema"
	postgresTables     = "postgresql tables"
)

// groups returns the checks. Each group has its own time limit.
func (s *subject) groups() [][]checkup.Check {
	return [][]checkup.Check{
		{{Name: "configuration", Run: s.checkConfiguration}},
		s.postgresChecks(),
		s.sink.Checks(clickhouse.Load{FlushTimeout: s.c.Relay.FlushTimeout, Linger: s.c.Relay.Linger}),
		{{Name: "destination of waiting batches", Needs: []string{postgresTables, clickhouse.TableCheck}, Run: s.checkDestination}},
	}
}

// width returns the length of the longest name.
func (s *subject) width() (width int) {
	for _, group := range s.groups() {
		for _, check := range group {
			width = max(width, len(check.Name))
		}
	}
	return width
}

func (s *subject) run(ctx context.Context, runner *checkup.Runner) {
	for _, group := range s.groups() {
		bounded, cancel := context.WithTimeout(ctx, s.timeout)
		runner.Run(bounded, group...)
		cancel()
	}
}

func (s *subject) checkConfiguration(context.Context) (string, error) {
	destination := "table " + s.c.ClickHouse.Table
	if s.c.ClickHouse.Cluster != "" {
		destination += " of the cluster " + s.c.ClickHouse.Cluster
	}
	return fmt.Sprintf("environment %s, %s, %d workers", s.c.Environment, destination, s.c.Relay.Workers), nil
}

func (s *subject) postgresChecks() []checkup.Check {
	var inspection store.Inspection
	// part returns a check of a part of the inspection.
	part := func(name string, p store.Part, detail string) checkup.Check {
		return checkup.Check{Name: name, Needs: []string{postgresSchema}, Run: func(context.Context) (string, error) {
			return detail, problems(inspection, p)
		}}
	}
	tables := part(postgresTables, store.Tables, "all tables are permanent and have their keys; batches are disjoint; ids ascend")
	describe := tables.Run
	tables.Run = func(ctx context.Context) (_ string, err error) {
		if inspection, err = s.store.Inspect(ctx); err != nil {
			return "", err
		}
		return describe(ctx)
	}
	return checkup.WithRemedy("find the cause in the log of PostgreSQL", []checkup.Check{
		{Name: postgresConnection, Run: s.checkConnection},
		{Name: "postgresql accepts writes", Needs: []string{postgresConnection}, Run: func(ctx context.Context) (string, error) {
			return "the server is a primary", postgres.CheckWritable(ctx, s.db.DB)
		}},
		{Name: "postgresql pooler", Needs: []string{postgresConnection}, Run: s.checkPooler},
		{Name: postgresSchema, Needs: []string{postgresConnection}, Run: s.checkSchema},
		tables,
		part("postgresql rights", store.Rights, store.RightsText()),
		part("postgresql settings", store.Settings, "UTF8; the settings of the relay are in effect"),
		{Name: "postgresql durability", Needs: []string{postgresSchema}, Run: func(context.Context) (string, error) {
			var warnings error
			for _, name := range inspection.Unsafe {
				warnings = errors.Join(warnings, checkup.Warn(store.UnsafeWarning(name)))
			}
			if warnings == nil && !inspection.Complete {
				return "", errIncomplete
			}
			return "a crash of the server loses no committed data", warnings
		}},
		{Name: "postgresql history", Needs: []string{postgresSchema}, Run: func(context.Context) (string, error) {
			switch {
			case s.c.Postgres.History == config.HistoryLossless:
				return "postgres.history is lossless: a failover is no change of history", nil
			case inspection.NoTimeline:
				return "", checkup.Warn("the server does not show its timeline: after each restart, the waiting events are checked and delivered later",
					"set postgres.history to lossless, if no failover of this server loses a commit")
			case !inspection.Complete:
				return "", errIncomplete
			}
			return "the server shows its timeline, so a failover is noticed", nil
		}},
	})
}

// errIncomplete skips a check that the inspection did not reach.
var errIncomplete = checkup.Skip(postgresTables + " has failed")

// problems returns the problems of the part.
func problems(inspection store.Inspection, p store.Part) error {
	var found error
	for _, problem := range inspection.Problems {
		if problem.Part == p {
			found = errors.Join(found, problem.Err)
		}
	}
	if found == nil && !inspection.Complete {
		return errIncomplete
	}
	return found
}

func (s *subject) checkConnection(ctx context.Context) (string, error) {
	server, err := postgres.Inspect(ctx, s.db.DB, s.c.Postgres.DSN)
	if err != nil {
		return "", err
	}
	encryption := "without TLS"
	if server.TLS {
		encryption = "with TLS"
	}
	return fmt.Sprintf("PostgreSQL %s at %s %s, role %s, database %s", server.Version, server.Address, encryption, server.Role, server.Database), nil
}

// poolerTimeout limits the wait for one connection of a pooler.
const poolerTimeout = 2 * time.Second

// checkPooler opens as many transactions as the relay can hold at a time. Each worker holds
// one for its lease. Behind a pooler, each takes a connection to the server.
func (s *subject) checkPooler(ctx context.Context) (string, error) {
	pooled, err := postgres.IsPooled(ctx, s.db)
	if err != nil {
		return "", err
	}
	if !pooled {
		return "none that shares sessions", nil
	}
	needed := s.c.Relay.Workers + 2
	db, err := postgres.Open(postgres.Options{
		DSN: s.c.Postgres.DSN, PasswordFile: s.c.Postgres.PasswordFile, MaxOpenConns: needed, ApplicationName: "diehard-check", Session: store.Session(s.c.Relay.FlushTimeout),
	})
	if err != nil {
		return "", err
	}
	defer db.Close()
	ctx, rollback := context.WithCancel(ctx) // ends the transactions
	defer rollback()
	for open := range needed {
		err := beginWithin(ctx, db, poolerTimeout)
		if errors.Is(err, context.DeadlineExceeded) && open > 0 {
			return "", &checkup.ProblemError{
				Problem: fmt.Sprintf("the pooler gives %d connections to the server at a time, but this relay needs %d: one for each worker and two more", open, needed),
				Remedy:  "raise the size of the pool to the sum of all relays, such as default_pool_size of PgBouncer, or lower relay.workers",
			}
		}
		if err != nil {
			return "", err
		}
	}
	notifications := "notifications by postgres.listen_dsn"
	if s.c.Postgres.ListenDSN == "" {
		notifications = "no notifications, because postgres.listen_dsn is not set: the relay polls"
	}
	return fmt.Sprintf("shares sessions; %d connections at a time; %s", needed, notifications), nil
}

// beginWithin begins a transaction that lasts until ctx ends.
func beginWithin(ctx context.Context, db *sqlx.DB, timeout time.Duration) error {
	began := make(chan error, 1)
	go func() {
		_, err := db.BeginTxx(ctx, nil)
		began <- err
	}()
	select {
	case err := <-began:
		return err
	case <-time.After(timeout):
		return context.DeadlineExceeded
	}
}

func (s *subject) checkSchema(ctx context.Context) (string, error) {
	versions, err := schema(s.c).Versions(ctx, s.db.DB)
	if err != nil {
		return "", err
	}
	texts := make([]string, len(versions))
	for i, version := range versions {
		if version.Have > version.Need {
			return "", checkup.Warn(fmt.Sprintf("the tables for %s have version %d, and this relay knows version %d", version.Tables, version.Have, version.Need),
				"deploy a newer relay, unless you have just migrated for it")
		}
		texts[i] = fmt.Sprintf("version %d of the tables for %s", version.Have, version.Tables)
	}
	return strings.Join(texts, ", "), nil
}

func (s *subject) checkDestination(ctx context.Context) (string, error) {
	destination, err := s.sink.Destination(ctx)
	if err != nil {
		return "", err
	}
	s.store.SetDestination(destination)
	return "no batch was attempted at another destination", s.store.CheckElsewhere(ctx)
}

// report writes results as lines.
type report struct {
	w     io.Writer
	json  bool
	width int // of the names
	err   error
}

func (r *report) write(result checkup.Result) {
	if r.err != nil {
		return
	}
	if r.json {
		r.err = writeJSON(r.w, []checkup.Result{result})
		return
	}
	const margin = "         "
	status := string(result.Status)
	if result.Status == checkup.Failed {
		status = strings.ToUpper(status)
	}
	line := fmt.Sprintf("%-7s  %-*s  %s", status, r.width, result.Name, printable(result.Detail))
	switch isLong := len(result.Name) > r.width; {
	case isLong && result.Status == checkup.Skipped:
		line = fmt.Sprintf("%-7s  %s: %s", status, result.Name, printable(result.Detail))
	case isLong && result.Detail != "":
		line = fmt.Sprintf("%-7s  %s\n%s%s", status, result.Name, margin, printable(result.Detail))
	}
	line = strings.TrimRight(line, " ")
	if result.Remedy != "" {
		line += "\n" + margin + "to fix it: " + printable(result.Remedy)
	}
	r.err = write(r.w, "%s\n", line)
}

// end writes the summary, or returns it as an error.
func (r *report) end(ctx context.Context, runner *checkup.Runner) error {
	if r.err != nil {
		return r.err
	}
	failed, skipped, warnings := runner.Count(checkup.Failed), runner.Count(checkup.Skipped), runner.Count(checkup.Warning)
	problems := checks(failed) + " failed"
	if skipped > 0 {
		problems += fmt.Sprintf(", %d skipped", skipped)
	}
	switch {
	case ctx.Err() != nil:
		return errors.New("interrupted: " + problems)
	case failed > 0 || skipped > 0:
		return errors.New(problems)
	case r.json:
		return nil
	case warnings > 0:
		return write(r.w, "%s passed, %d with a warning\n", checks(runner.Count(checkup.OK)+warnings), warnings)
	}
	return write(r.w, "%s passed\n", checks(runner.Count(checkup.OK)))
}

func checks(n int) string {
	if n == 1 {
		return "1 check"
	}
	return fmt.Sprintf("%d checks", n)
}
