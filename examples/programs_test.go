package examples_test

import (
	"context"
	"database/sql"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
)

// newDatabase creates a database with the outbox and the examples' table, and returns
// its DSN.
func newDatabase(ctx context.Context) string {
	GinkgoHelper()
	dsn := suite.PostgresDSN(ctx)
	table, err := os.ReadFile("orders.sql")
	Expect(err).NotTo(HaveOccurred())
	testengines.Query(ctx, "postgres", dsn, string(table))
	return dsn
}

// withMode returns the DSN with one of pgx's query execution modes.
func withMode(dsn, mode string) string {
	GinkgoHelper()
	parsed, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	query := parsed.Query()
	query.Set("default_query_exec_mode", mode)
	parsed.RawQuery = query.Encode()
	return parsed.String()
}

// pgxModes lists all query execution modes of pgx. The first mode is pgx's default.
var pgxModes = []string{"cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol"}

// example returns the command that runs an example in Go.
func example(ctx context.Context, name string) *exec.Cmd {
	GinkgoHelper()
	return program{Path: filepath.Join(prepared().Examples, name)}.command(ctx)
}

// run runs the command with the database's DSN, and returns the command's output.
func run(cmd *exec.Cmd, dsn string) string {
	GinkgoHelper()
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "DATABASE_URL="+dsn)
	output, err := cmd.CombinedOutput()
	Expect(err).NotTo(HaveOccurred(), string(output))
	return string(output)
}

// expectOneOrder runs an example. It expects that the example has placed and published
// the first order, and that the database has neither the second order nor its event.
func expectOneOrder(ctx context.Context, cmd *exec.Cmd, dsn, exampleDSN, environment string) {
	GinkgoHelper()
	output := run(cmd, exampleDSN)
	Expect(output).To(And(MatchRegexp(`order 2 was refused: .*orders_cents_check`), Not(ContainSubstring("order 1"))))

	db := testengines.OpenPostgres(dsn, nil)
	var orders []int64
	Expect(db.SelectContext(ctx, &orders, "SELECT id FROM orders")).To(Succeed())
	Expect(orders).To(Equal([]int64{1}))
	var events []struct {
		EventType       string         `db:"event_type"`
		EventContext    string         `db:"event_context"`
		Environment     string         `db:"environment"`
		MetadataVersion int64          `db:"metadata_version"`
		Traceparent     sql.NullString `db:"traceparent"`
	}
	Expect(sqlx.SelectContext(ctx, db, &events,
		"SELECT event_type, event_context, environment, metadata_version, traceparent FROM outbox_events")).To(Succeed())
	Expect(events).To(HaveLen(1))
	Expect(events[0].EventType).To(Equal("order_placed"))
	Expect(events[0].EventContext).To(MatchJSON(`{"order_id": 1, "cents": 4200}`))
	Expect(events[0].Environment).To(Equal(environment))
	Expect(events[0].MetadataVersion).To(Equal(int64(1)))
	Expect(events[0].Traceparent.Valid).To(BeFalse())
}

var _ = Describe("An example publishes an order if and only if the order is placed", func() {
	for _, name := range []string{"databasesql", "sqlx", "pgx", "pgxstdlib", "gorm", "bun"} {
		It("in "+name, func(ctx SpecContext) {
			dsn := newDatabase(ctx)
			expectOneOrder(ctx, example(ctx, name), dsn, dsn, "Production")
		})
	}

	for _, name := range []string{"pgx", "pgxstdlib", "gorm"} {
		for _, mode := range pgxModes[1:] {
			It("in "+name+" with pgx's mode "+mode, func(ctx SpecContext) {
				dsn := newDatabase(ctx)
				expectOneOrder(ctx, example(ctx, name), dsn, withMode(dsn, mode), "Production")
			})
		}
	}

	for _, name := range []string{"pgx", "pgxstdlib"} {
		for _, mode := range []string{"exec", "simple_protocol"} {
			It("in "+name+" behind PgBouncer with pgx's mode "+mode, func(ctx SpecContext) {
				dsn := newDatabase(ctx)
				expectOneOrder(ctx, example(ctx, name), dsn, withMode(startPgBouncer(ctx, dsn), mode), "Production")
			})
		}
	}

	It("in python", func(ctx SpecContext) {
		dsn := newDatabase(ctx)
		expectOneOrder(ctx, prepared().Python.command(ctx, "python/place_order.py"), dsn, dsn, "Local")
	})

	It("in node", func(ctx SpecContext) {
		install := exec.CommandContext(ctx, "npm", "install", "--no-save", "--no-audit", "--no-fund")
		install.Dir = "node"
		output, err := install.CombinedOutput()
		Expect(err).NotTo(HaveOccurred(), string(output))
		dsn := newDatabase(ctx)
		expectOneOrder(ctx, exec.CommandContext(ctx, "node", "node/place_order.mjs"), dsn, dsn, "Local")
	})
})

var _ = Describe("The example of outboxtest", func() {
	It("passes", func(ctx SpecContext) {
		test := example(ctx, "shop.test")
		test.Args = append(test.Args, "-test.v")
		Expect(run(test, newDatabase(ctx))).To(And(
			ContainSubstring("--- PASS: TestAnOrderIsPublished"), ContainSubstring("--- PASS: TestARefusedOrderIsNotPublished")))
	})
})

// findPython returns a Python with psycopg. If psycopg is not installed, it unpacks
// Debian's packages.
func findPython(ctx context.Context) program {
	GinkgoHelper()
	path, err := exec.LookPath("python3")
	if err != nil {
		return program{Missing: "Python is missing: install it and psycopg from your package manager (Debian: apt install python3-psycopg)"}
	}
	importable := func(env ...string) bool {
		cmd := exec.CommandContext(ctx, path, "-c", "import psycopg")
		cmd.Env = append(os.Environ(), env...)
		output, err := cmd.CombinedOutput()
		GinkgoWriter.Printf("import psycopg: %v: %s", err, output)
		return err == nil
	}
	if importable() {
		return program{Path: path}
	}
	if dir, ok := unpack(ctx, "psycopg", "python3-psycopg", "python3-typing-extensions"); ok {
		env := "PYTHONPATH=" + filepath.Join(dir, "usr", "lib", "python3", "dist-packages")
		if importable(env) {
			return program{Path: path, Env: []string{env}}
		}
	}
	return program{Missing: "the Python driver psycopg is missing: install it (Debian: apt install python3-psycopg)"}
}
