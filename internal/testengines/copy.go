package testengines

import (
	"context"
	"fmt"
	"strings"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// Rows are the rows of some tables, as in a dump without the schema.
type Rows map[string][]string

// DumpTables reads the tables in one snapshot.
func DumpTables(ctx context.Context, db *sqlx.DB, tables ...string) Rows {
	GinkgoHelper()
	tx, err := db.BeginTxx(ctx, nil)
	Expect(err).NotTo(HaveOccurred())
	defer func() { _ = tx.Rollback() }() // the transaction only reads
	tx.MustExecContext(ctx, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
	rows := Rows{}
	for _, table := range tables {
		var texts []string
		Expect(tx.SelectContext(ctx, &texts, fmt.Sprintf("SELECT %[1]s::text FROM %[1]s", table))).To(Succeed())
		rows[table] = texts
	}
	return rows
}

// Restore adds the rows to the tables of a migrated database in one transaction.
func (r Rows) Restore(ctx context.Context, db *sqlx.DB) {
	GinkgoHelper()
	tx, err := db.BeginTxx(ctx, nil)
	Expect(err).NotTo(HaveOccurred())
	defer func() { _ = tx.Rollback() }()
	for table, texts := range r {
		var columns []string
		Expect(tx.SelectContext(ctx, &columns, `SELECT quote_ident(attname) FROM pg_attribute
			WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''`, table)).To(Succeed())
		list := strings.Join(columns, ", ")
		tx.MustExecContext(ctx, fmt.Sprintf(`INSERT INTO %[1]s (%[2]s) OVERRIDING SYSTEM VALUE
			SELECT %[2]s FROM (SELECT (text::%[1]s).* FROM unnest($1::text[]) AS text) AS dumped`, table, list), pq.Array(texts))
	}
	Expect(tx.Commit()).To(Succeed())
}

// PostgresDSNOf returns the DSN of the named database.
func (e *Engines) PostgresDSNOf(database string) string {
	GinkgoHelper()
	return withDatabase(e.shared.Postgres, database)
}

// CopyOfPostgresDSN returns the DSN of a copy of the named database. It ends all
// connections to the database.
func (e *Engines) CopyOfPostgresDSN(ctx context.Context, database string) string {
	GinkgoHelper()
	Query(ctx, "postgres", e.shared.Postgres, "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '"+database+"'")
	return e.postgresDatabase(ctx, database)
}
