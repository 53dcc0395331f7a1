package postgres_test

import (
	"context"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("Listen", func() {
	listen := func(ctx context.Context, o postgres.ListenOptions) map[string]<-chan struct{} {
		GinkgoHelper()
		if o.Log == nil {
			o.Log, _ = logs()
		}
		received, err := postgres.Listen(ctx, o)
		Expect(err).NotTo(HaveOccurred())
		return received
	}

	It("reports the notifications of each channel, and each connect", func(ctx SpecContext) {
		dsn := newDatabase(ctx)
		received := listen(ctx, postgres.ListenOptions{DSN: dsn, Channels: []string{"one", "two"}})
		Eventually(received["one"]).Should(Receive())
		Eventually(received["two"]).Should(Receive())

		_, err := open(postgres.Options{DSN: dsn}).ExecContext(ctx, "NOTIFY two")
		Expect(err).NotTo(HaveOccurred())
		Eventually(received["two"]).Should(Receive())
		Consistently(received["one"], "100ms").ShouldNot(Receive())
	})

	It("merges unreceived notifications and does not block on them", func(ctx SpecContext) {
		dsn := newDatabase(ctx)
		received := listen(ctx, postgres.ListenOptions{DSN: dsn, Channels: []string{"busy", "last"}})
		Eventually(received["busy"]).Should(Receive())
		Eventually(received["last"]).Should(Receive())

		db := open(postgres.Options{DSN: dsn})
		for range 300 { // more than all buffers can hold together
			_, err := db.ExecContext(ctx, "NOTIFY busy")
			Expect(err).NotTo(HaveOccurred())
		}
		_, err := db.ExecContext(ctx, "NOTIFY last")
		Expect(err).NotTo(HaveOccurred())
		Eventually(received["last"]).Should(Receive())
		Expect(received["busy"]).To(Receive())
		Expect(received["busy"]).NotTo(Receive())
	})

	It("survives a restart of the server, logs it once, and wakes the receiver after it", func(ctx SpecContext) {
		own := testengines.StartPostgres(ctx, nil)
		log, lines := logs()
		received := listen(ctx, postgres.ListenOptions{DSN: own.DSN(), Channels: []string{"work"}, Log: log})
		Eventually(received["work"]).Should(Receive())
		Expect(lines.Contents()).To(BeEmpty())

		own.Kill()
		Eventually(lines).Should(gbytes.Say("postgresql notifications unavailable"))
		own.Start(ctx)
		Eventually(received["work"]).Should(Receive())
		Eventually(lines).Should(gbytes.Say("again"))
		Expect(strings.Count(string(lines.Contents()), "\n")).To(Equal(2))

		_, err := open(postgres.Options{DSN: own.DSN()}).ExecContext(ctx, "NOTIFY work")
		Expect(err).NotTo(HaveOccurred())
		Eventually(received["work"]).Should(Receive())
	})

	It("keeps its connection if sessions have a short idle timeout", func(ctx SpecContext) {
		dsn := newDatabase(ctx)
		open(postgres.Options{DSN: dsn}).MustExecContext(ctx,
			"DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET idle_session_timeout = 500', current_database()); END $$")
		log, lines := logs()
		received := listen(ctx, postgres.ListenOptions{DSN: dsn, Channels: []string{"work"}, Log: log})
		Eventually(received["work"]).Should(Receive())
		Consistently(lines.Contents).WithTimeout(2 * time.Second).Should(BeEmpty())
	})

	It("waits for a server that has not started", func(ctx SpecContext) {
		own := testengines.StartPostgres(ctx, nil)
		own.Kill()
		log, lines := logs()
		received := listen(ctx, postgres.ListenOptions{DSN: own.DSN(), Channels: []string{"work"}, Log: log})
		Eventually(lines).Should(gbytes.Say("postgresql notifications unavailable"))
		own.Start(ctx)
		Eventually(received["work"]).Should(Receive())
	})

	It("closes its connection when its context ends, without a log record", func(ctx SpecContext) {
		dsn := newDatabase(ctx)
		listening, stop := context.WithCancel(ctx)
		log, lines := logs()
		received := listen(listening, postgres.ListenOptions{
			DSN: dsn, ApplicationName: "listener", Channels: []string{"work"}, Log: log,
		})
		Eventually(received["work"]).Should(Receive())
		db := open(postgres.Options{DSN: dsn})
		connections := func() (n int, err error) {
			err = db.GetContext(ctx, &n, "SELECT count(*) FROM pg_stat_activity "+
				"WHERE application_name = 'listener' AND datname = current_database()")
			return n, err
		}
		Expect(connections()).To(Equal(1))
		stop()
		Eventually(connections).Should(BeZero())
		Expect(lines.Contents()).To(BeEmpty())
	})

	It("refuses an invalid DSN", func(ctx SpecContext) {
		_, err := postgres.Listen(ctx, postgres.ListenOptions{DSN: "postgres://u:s3cret%@h"})
		Expect(err).To(MatchError(ContainSubstring("not a PostgreSQL DSN")))
	})
})
