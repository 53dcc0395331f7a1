package examples_test

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
)

var _ = Describe("With pgx", func() {
	openPool := func(ctx context.Context, mode string) *pgxpool.Pool {
		GinkgoHelper()
		pool, err := pgxpool.New(ctx, withMode(suite.LastingPostgresDSN(ctx), mode))
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(pool.Close)
		return pool
	}

	for _, mode := range pgxModes {
		It("outboxtest finds the events of the transaction in the mode "+mode, func(ctx SpecContext) {
			publisher := outbox.NewPublisher(outbox.PublisherOptions{})
			publish := func(tx pgx.Tx, eventType string) {
				GinkgoHelper()
				event, err := outbox.NewEvent(outboxtest.JSON(`{}`), outbox.WithType(eventType))
				Expect(err).NotTo(HaveOccurred())
				Expect(publisher.Publish(ctx, outbox.Pgx(tx), event)).To(Succeed())
			}
			tx, err := openPool(ctx, mode).Begin(ctx)
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(func(ctx SpecContext) { Expect(tx.Rollback(ctx)).To(Succeed()) })
			outboxtest.RequireNotPublished(ctx, GinkgoT(), outboxtest.Pgx(tx))
			publish(tx, "first")
			savepoint, err := tx.Begin(ctx)
			Expect(err).NotTo(HaveOccurred())
			publish(savepoint, "second")
			Expect(savepoint.Commit(ctx)).To(Succeed())
			outboxtest.RequirePublished(ctx, GinkgoT(), outboxtest.Pgx(tx),
				outboxtest.Want{EventType: "first", EventContext: `{}`}, outboxtest.Want{EventType: "second"})
		})

		It("a Notifier notifies in the mode "+mode, func(ctx SpecContext) {
			pool := openPool(ctx, mode)
			listener, err := pool.Acquire(ctx)
			Expect(err).NotTo(HaveOccurred())
			defer listener.Release()
			_, err = listener.Exec(ctx, "LISTEN "+outbox.Channel)
			Expect(err).NotTo(HaveOccurred())

			notifier := outbox.NewNotifier(outbox.PgxPool(pool), nil)
			running, stop := context.WithCancel(ctx)
			ended := make(chan error, 1)
			go func() { ended <- notifier.Run(running) }()
			notifier.Hint()
			notification, err := listener.Conn().WaitForNotification(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(notification.Channel).To(Equal(outbox.Channel))
			stop()
			Eventually(ended).Should(Receive(BeNil()))
		}, SpecTimeout(time.Minute))
	}
})
