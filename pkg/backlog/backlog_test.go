package backlog_test

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/backlog"
	"github.com/diehard-outbox/diehard/pkg/telemetry"
)

func TestBacklog(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "backlog")
}

var suite = testengines.Start(testengines.Options{Postgres: true})

var _ = Describe("Watch", func() {
	const mib = 1 << 20

	var (
		dsn   string
		owner *sqlx.DB
		log   *gbytes.Buffer
	)

	BeforeEach(func(ctx SpecContext) {
		dsn = suite.PostgresDSN(ctx)
		owner = testengines.OpenPostgres(dsn, nil)
		owner.MustExecContext(ctx, "ALTER TABLE outbox_events SET (autovacuum_enabled = false)")
		log = gbytes.NewBuffer()
	})

	watch := func(limit int64, settings map[string]string) *backlog.Watch {
		GinkgoHelper()
		return backlog.New(backlog.Options{
			DB: testengines.OpenPostgres(dsn, settings), Limit: limit,
			Log: telemetry.NewLogger(io.MultiWriter(log, GinkgoWriter), telemetry.LogOptions{}),
		})
	}
	// publish publishes events of about 1 KiB that cannot be compressed.
	publish := func(ctx context.Context, events int) {
		GinkgoHelper()
		owner.MustExecContext(ctx, `INSERT INTO outbox_events (event_type, event_context)
			SELECT 'a', to_json((SELECT string_agg(md5(n::text || m::text), '') FROM generate_series(1, 32) AS m))
			FROM generate_series(1, $1) AS n`, events)
	}
	eventually := func(ctx context.Context, w *backlog.Watch, full bool) {
		GinkgoHelper()
		Eventually(ctx, func() (bool, error) { // PostgreSQL counts rows within a second
			err := w.Look(ctx)
			return w.Full(), err
		}).WithTimeout(time.Minute).Should(Equal(full))
	}

	It("finds the outbox full until a tenth of the limit is free, although the table does not shrink", func(ctx SpecContext) {
		w := watch(8*mib, nil)
		Expect(w.Look(ctx)).To(Succeed())
		Expect(w.Full()).To(BeFalse())
		publish(ctx, 8_000)
		eventually(ctx, w, true)
		Expect(log).To(gbytes.Say(`"level":"ERROR","msg":"outbox full, publishing refused","err":"\d+ bytes of events wait, and outbox.max_backlog_bytes is 8388608`))
		Expect(w.Look(ctx)).To(Succeed())
		Expect(log).NotTo(gbytes.Say("outbox full"), "once")

		owner.MustExecContext(ctx, "DELETE FROM outbox_events WHERE id % 100 = 0")
		owner.MustExecContext(ctx, "VACUUM (TRUNCATE false) outbox_events")
		Expect(w.Look(ctx)).To(Succeed())
		Expect(w.Full()).To(BeTrue(), "less than a tenth is free")

		owner.MustExecContext(ctx, "DELETE FROM outbox_events WHERE id % 2 = 0")
		owner.MustExecContext(ctx, "VACUUM (TRUNCATE false) outbox_events")
		eventually(ctx, w, false)
		Expect(log).To(gbytes.Say("outbox no longer full"))
	})

	It("finds it full after PostgreSQL has lost its statistics", func(ctx SpecContext) {
		publish(ctx, 8_000)
		owner.MustExecContext(ctx, "VACUUM outbox_events")
		owner.MustExecContext(ctx, "SELECT pg_stat_reset()")
		w := watch(8*mib, nil)
		Expect(w.Look(ctx)).To(Succeed())
		Expect(w.Full()).To(BeTrue())
	})

	It("needs no right to read events", func(ctx SpecContext) {
		role := fmt.Sprintf("publisher_%d_%d", GinkgoParallelProcess(), time.Now().UnixNano())
		owner.MustExecContext(ctx, "CREATE ROLE "+role)
		DeferCleanup(func(ctx SpecContext) { owner.MustExecContext(ctx, "DROP ROLE "+role) })
		publish(ctx, 8_000)
		eventually(ctx, watch(8*mib, map[string]string{"role": role}), true)
	})
})
