package postgres_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("InStatement", func() {
	const insert = "INSERT INTO things VALUES ($1) RETURNING id"

	var (
		dsn    string
		proxy  *faults.Proxy
		db     *sqlx.DB // through the proxy
		direct *sqlx.DB
	)

	BeforeEach(func(ctx SpecContext) {
		dsn = newDatabase(ctx)
		direct = open(postgres.Options{DSN: dsn})
		_, err := direct.ExecContext(ctx, "CREATE TABLE things (id int PRIMARY KEY)")
		Expect(err).NotTo(HaveOccurred())
		var through string
		proxy, through = faults.StartProxyTo(dsn)
		db = open(postgres.Options{DSN: through, MaxOpenConns: 1})
		Expect(db.PingContext(ctx)).To(Succeed())
	})

	// run runs the statement and reads its rows.
	run := func(ctx context.Context, statement string, args ...any) error {
		return postgres.InStatement(ctx, db, func(q *postgres.Statement) error {
			rows, err := q.QueryContext(ctx, statement, args...)
			if err != nil {
				return err
			}
			defer rows.Close()
			for rows.Next() {
			}
			return rows.Err()
		})
	}
	count := func(ctx context.Context) (n int, err error) {
		return n, direct.GetContext(ctx, &n, "SELECT count(*) FROM things")
	}

	It("commits the statement", func(ctx SpecContext) {
		Expect(run(ctx, insert, 1)).To(Succeed())
		Expect(count(ctx)).To(Equal(1))
	})

	It("returns errors of the server unchanged, even at the commit", func(ctx SpecContext) {
		_, err := direct.ExecContext(ctx, `
			CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'on purpose'; END $$;
			CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON things
			DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()`)
		Expect(err).NotTo(HaveOccurred())
		for _, divisor := range []int{1, 0} {
			err := run(ctx, "INSERT INTO things VALUES (1 / $1::int) RETURNING id", divisor)
			Expect(err).To(HaveOccurred())
			Expect(err).NotTo(MatchError(postgres.ErrOutcomeUnknown))
		}
		Expect(count(ctx)).To(BeZero())
	})

	It("returns the caller's own error unchanged if nothing was sent", func(ctx SpecContext) {
		failure := errors.New("on purpose")
		Expect(postgres.InStatement(ctx, db, func(*postgres.Statement) error { return failure })).To(BeIdenticalTo(failure))
	})

	It("reports an unknown outcome if the server's reply is lost, and does not retry", SpecTimeout(time.Minute), func(ctx SpecContext) {
		const id = 424_242
		Expect(run(ctx, insert, 1)).To(Succeed())
		proxy.HoldFrom(faults.Answers, strconv.Itoa(id))
		failed := make(chan error, 1)
		go func() { failed <- run(ctx, insert, id) }()
		Eventually(ctx, proxy.Held).ShouldNot(BeZero())
		proxy.Reset()
		Eventually(ctx, failed).Should(Receive(MatchError(postgres.ErrOutcomeUnknown)))
		Expect(count(ctx)).To(Equal(2))
	})

	It("reports a known outcome if it cannot connect", func(ctx SpecContext) {
		proxy.Down()
		err := run(ctx, insert, 1)
		Expect(postgres.IsUnavailable(err)).To(BeTrue(), "%v", err)
		Expect(err).NotTo(MatchError(postgres.ErrOutcomeUnknown))
	})

	It("does not use an idle connection that the server has closed", func(ctx SpecContext) {
		var backend int
		Expect(db.GetContext(ctx, &backend, "SELECT pg_backend_pid()")).To(Succeed())
		_, err := direct.ExecContext(ctx, "SELECT pg_terminate_backend($1, 10000)", backend)
		Expect(err).NotTo(HaveOccurred())
		Eventually(ctx, proxy.Connections).Should(BeZero())
		Expect(run(ctx, insert, 1)).To(Succeed())
		Expect(count(ctx)).To(Equal(1))
	})

	It("keeps the statement prepared", func(ctx SpecContext) {
		for id := range 3 {
			Expect(run(ctx, insert, id)).To(Succeed())
		}
		Expect(prepared(ctx, db)).To(Equal([]string{insert}))
		Expect(count(ctx)).To(Equal(3))
	})

	It("keeps no other statement of the connection prepared", func(ctx SpecContext) {
		Expect(run(ctx, insert, 1)).To(Succeed())
		_, err := db.ExecContext(ctx, "DELETE FROM things WHERE id = $1", 1)
		Expect(err).NotTo(HaveOccurred())
		Expect(prepared(ctx, db)).To(Equal([]string{insert}))
	})

	It("prepares a statement again after its columns have changed", func(ctx SpecContext) {
		const all = "SELECT * FROM things WHERE id > $1"
		Expect(run(ctx, all, 0)).To(Succeed())
		_, err := direct.ExecContext(ctx, "ALTER TABLE things ADD COLUMN name text")
		Expect(err).NotTo(HaveOccurred())
		Expect(run(ctx, all, 0)).To(Succeed())
		Expect(prepared(ctx, db)).To(Equal([]string{all}))
	})

	It("keeps no statement prepared behind a pooler", func(ctx SpecContext) {
		db = open(postgres.Options{DSN: startPooler(dsn), MaxOpenConns: 1})
		Expect(run(ctx, insert, 1)).To(Succeed())
		Expect(prepared(ctx, db)).To(BeEmpty())
		Expect(count(ctx)).To(Equal(1))
	})
})

var _ = Describe("A pool with KeepStatements", func() {
	const (
		insert = "INSERT INTO things VALUES ($1)"
		all    = "SELECT * FROM things WHERE id >= $1"
	)

	var (
		dsn string
		db  *sqlx.DB
	)

	keeping := func(dsn string) *sqlx.DB {
		return open(postgres.Options{DSN: dsn, MaxOpenConns: 1, KeepStatements: true})
	}

	BeforeEach(func(ctx SpecContext) {
		dsn = newDatabase(ctx)
		db = keeping(dsn)
		_, err := db.ExecContext(ctx, "CREATE TABLE things (id int PRIMARY KEY)")
		Expect(err).NotTo(HaveOccurred())
	})

	use := func(ctx context.Context, ids ...int) {
		GinkgoHelper()
		for i, id := range ids {
			_, err := db.ExecContext(ctx, insert, id)
			Expect(err).NotTo(HaveOccurred())
			read, err := db.PreparexContext(ctx, all)
			Expect(err).NotTo(HaveOccurred())
			var found []int
			Expect(read.SelectContext(ctx, &found, 0)).To(Succeed())
			Expect(found).To(HaveExactElements(ids[:i+1]))
			Expect(read.Close()).To(Succeed())
		}
	}

	It("prepares each statement with parameters once", func(ctx SpecContext) {
		use(ctx, 1, 2, 3)
		Expect(prepared(ctx, db)).To(ConsistOf(insert, all))
	})

	It("keeps no statement prepared behind a pooler", func(ctx SpecContext) {
		db = keeping(startPooler(dsn))
		use(ctx, 1, 2, 3)
		Expect(prepared(ctx, db)).To(BeEmpty())
	})

	It("fails a transaction with a stale statement, and prepares it again in the next", func(ctx SpecContext) {
		use(ctx, 1)
		_, err := db.ExecContext(ctx, "ALTER TABLE things ADD COLUMN name text")
		Expect(err).NotTo(HaveOccurred())
		read := func() error {
			tx, err := db.BeginTxx(ctx, nil)
			Expect(err).NotTo(HaveOccurred())
			defer tx.Rollback() //nolint:errcheck // the transaction is read-only
			_, err = tx.ExecContext(ctx, all, 0)
			return err
		}
		Expect(read()).To(MatchError(ContainSubstring("cached plan must not change result type")))
		Expect(read()).To(Succeed())
		Expect(prepared(ctx, db)).To(ConsistOf(insert, all))
	})
})

// prepared returns the prepared statements of db's only connection.
func prepared(ctx context.Context, db *sqlx.DB) (statements []string) {
	GinkgoHelper()
	Expect(db.SelectContext(ctx, &statements, "SELECT statement FROM pg_prepared_statements")).To(Succeed())
	return statements
}

// startPooler starts a proxy that changes the process id in BackendKeyData, as a pooler
// does, and returns its DSN.
func startPooler(dsn string) string {
	GinkgoHelper()
	address, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	server := address.Host
	address.Host = listen(func(client net.Conn) { pool(client, server) })
	return address.String()
}

// listen serves each client until the spec ends.
func listen(serve func(net.Conn)) (address string) {
	GinkgoHelper()
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // closed when the spec ends
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(listener.Close)
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go serve(client)
		}
	}()
	return listener.Addr().String()
}

func pool(client net.Conn, server string) {
	defer client.Close()
	upstream, err := net.Dial("tcp", server) //nolint:noctx // a local server
	if err != nil {
		return
	}
	defer upstream.Close()
	go func() {
		_, _ = io.Copy(upstream, client)
		_ = upstream.Close()
	}()
	// Copy message by message until the first ReadyForQuery. A message has a type, a
	// length and the content. The length includes its own four bytes.
	header := make([]byte, 5)
	for header[0] != 'Z' {
		if _, err := io.ReadFull(upstream, header); err != nil {
			return
		}
		content := make([]byte, binary.BigEndian.Uint32(header[1:])-4)
		if _, err := io.ReadFull(upstream, content); err != nil {
			return
		}
		if header[0] == 'K' { // BackendKeyData
			content[0] ^= 0x7f
		}
		if _, err := client.Write(append(slices.Clone(header), content...)); err != nil {
			return
		}
	}
	_, _ = io.Copy(client, upstream)
}
