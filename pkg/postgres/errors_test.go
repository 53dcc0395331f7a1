package postgres_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("IsUnavailable", func() {
	const unavailable, other = true, false

	run := func(ctx context.Context, o postgres.Options, statement string) error {
		GinkgoHelper()
		_, err := open(o).ExecContext(ctx, statement)
		Expect(err).To(HaveOccurred())
		return fmt.Errorf("wrapped: %w", err)
	}

	DescribeTable("distinguishes an unavailable server from other errors",
		func(ctx SpecContext, provoke func(ctx context.Context) error, expected bool) {
			err := provoke(ctx)
			Expect(postgres.IsUnavailable(err)).To(Equal(expected), "%v", err)
		},
		Entry("no error", func(context.Context) error { return nil }, other),
		Entry("an error of the program", func(context.Context) error { return errors.New("ours") }, other),
		Entry("a refused connection", func(ctx context.Context) error {
			return run(ctx, postgres.Options{DSN: "postgres://u@127.0.0.1:1/d?sslmode=disable"}, "SELECT 1")
		}, unavailable),
		Entry("a connection reset during the handshake", func(ctx context.Context) (err error) {
			dsn := resetting()
			for range 20 { // the connection fails at a different step each time
				if err = run(ctx, postgres.Options{DSN: dsn}, "SELECT 1"); !postgres.IsUnavailable(err) {
					break
				}
			}
			return err
		}, unavailable),
		Entry("a terminated connection", func(ctx context.Context) error {
			return run(ctx, postgres.Options{DSN: root}, "SELECT pg_terminate_backend(pg_backend_pid())")
		}, unavailable),
		Entry("a read-only server", func(ctx context.Context) error {
			return run(ctx, postgres.Options{DSN: newDatabase(ctx), Session: map[string]string{
				"default_transaction_read_only": "on",
			}}, "CREATE TABLE things ()")
		}, unavailable),
		Entry("a read-only server, in a transaction", func(ctx context.Context) error {
			db := open(postgres.Options{DSN: newDatabase(ctx), Session: map[string]string{"default_transaction_read_only": "on"}})
			return postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
				_, err := tx.ExecContext(ctx, "CREATE TABLE things ()")
				return err
			})
		}, unavailable),
		Entry("a statement timeout", func(ctx context.Context) error {
			return run(ctx, postgres.Options{DSN: root, Session: map[string]string{"statement_timeout": "10ms"}},
				"SELECT pg_sleep(60)")
		}, unavailable),
		Entry("an expired context", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			defer cancel()
			return run(ctx, postgres.Options{DSN: root}, "SELECT pg_sleep(60)")
		}, unavailable),
		Entry("too many connections", func(ctx context.Context) error {
			role := fmt.Sprintf("crowd_%d", GinkgoParallelProcess())
			_, err := open(postgres.Options{DSN: root}).ExecContext(ctx,
				"CREATE ROLE "+role+" LOGIN PASSWORD 'crowd' CONNECTION LIMIT 0")
			Expect(err).NotTo(HaveOccurred())
			address, err := url.Parse(root)
			Expect(err).NotTo(HaveOccurred())
			address.User = url.UserPassword(role, "crowd")
			return run(ctx, postgres.Options{DSN: address.String()}, "SELECT 1")
		}, unavailable),
		Entry("a canceled context", func(ctx context.Context) error {
			ctx, cancel := context.WithCancel(ctx)
			cancel()
			return run(ctx, postgres.Options{DSN: root}, "SELECT 1")
		}, other),
		Entry("a syntax error", func(ctx context.Context) error {
			return run(ctx, postgres.Options{DSN: root}, "SELEC 1")
		}, other),
		Entry("a wrong password", func(ctx context.Context) error {
			address, err := url.Parse(root)
			Expect(err).NotTo(HaveOccurred())
			address.User = url.UserPassword(address.User.Username(), "wrong")
			return run(ctx, postgres.Options{DSN: address.String()}, "SELECT 1")
		}, other),
	)

	It("recognizes that the server died during a statement", func(ctx SpecContext) {
		own := testengines.StartPostgres(ctx, nil)
		db := open(postgres.Options{DSN: own.DSN()})
		watcher := open(postgres.Options{DSN: own.DSN()})

		failed := make(chan error, 1)
		go func() {
			_, err := db.ExecContext(ctx, "SELECT pg_sleep(600)")
			failed <- err
		}()
		Eventually(func() (sleeping bool, err error) {
			err = watcher.GetContext(ctx, &sleeping, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep')")
			return sleeping, err
		}).Should(BeTrue())
		own.Kill()
		var err2 error
		Eventually(failed).Should(Receive(&err2))
		Expect(postgres.IsUnavailable(err2)).To(BeTrue(), "%v", err2)
	})
})

var _ = Describe("IsUniqueViolation", func() {
	It("compares the name of the constraint", func(ctx SpecContext) {
		db := open(postgres.Options{DSN: newDatabase(ctx)})
		_, err := db.ExecContext(ctx, "CREATE TABLE things (id int CONSTRAINT things_once UNIQUE); INSERT INTO things VALUES (1)")
		Expect(err).NotTo(HaveOccurred())
		_, err = db.ExecContext(ctx, "INSERT INTO things VALUES ($1)", 1)
		err = fmt.Errorf("wrapped: %w", err)
		Expect(postgres.IsUniqueViolation(err, "things_once")).To(BeTrue())
		Expect(postgres.IsUniqueViolation(err, "others_once")).To(BeFalse())
		Expect(postgres.IsUnavailable(err)).To(BeFalse())
		Expect(postgres.IsUniqueViolation(nil, "things_once")).To(BeFalse())
	})
})

// resetting starts a server that asks for a password and then resets the connection.
// The client notices the reset when it writes or reads.
func resetting() (dsn string) {
	GinkgoHelper()
	address := listen(func(client net.Conn) {
		length := make([]byte, 4) // of the startup message, including the length
		if _, err := io.ReadFull(client, length); err == nil {
			_, _ = io.CopyN(io.Discard, client, int64(binary.BigEndian.Uint32(length))-4)
		}
		_, _ = client.Write([]byte{'R', 0, 0, 0, 8, 0, 0, 0, 3}) // AuthenticationCleartextPassword
		_ = client.(*net.TCPConn).SetLinger(0)
		_ = client.Close()
	})
	return "postgres://u:p@" + address + "/d?sslmode=disable"
}
