package store_test

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

const operator = "alice@laptop"

var _ = Describe("The actions of operators", func() {
	var (
		db *sqlx.DB
		s  *store.Store
	)

	BeforeEach(func(ctx SpecContext) {
		db = newDatabase(ctx)
		s = newStore(db)
	})

	audited := func(ctx context.Context) (actions []string) {
		GinkgoHelper()
		records, err := s.AuditLog(ctx, 100)
		Expect(err).NotTo(HaveOccurred())
		for _, record := range records {
			Expect(record.Actor).To(Equal(operator))
			actions = append(actions, record.Action+" "+string(record.Details))
		}
		return actions
	}
	claim := func(ctx context.Context) *store.Lease {
		GinkgoHelper()
		lease, err := s.Claim(ctx, anyBytes, true)
		Expect(err).NotTo(HaveOccurred())
		Expect(lease).NotTo(BeNil())
		DeferCleanup(lease.Release)
		return lease
	}
	state := func(ctx context.Context, id uuid.UUID) store.BatchState {
		GinkgoHelper()
		batch, err := s.Batch(ctx, id)
		Expect(err).NotTo(HaveOccurred())
		stats, err := s.Stats(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(stats.Batches).To(HaveKeyWithValue(batch.State, HaveField("Batches", int64(1))), "the figures agree")
		listed, err := s.Batches(ctx, batch.State, 10)
		Expect(err).NotTo(HaveOccurred())
		Expect(listed).To(HaveExactElements(HaveField("ID", id)), "the list agrees")
		return batch.State
	}

	Describe("Pause", func() {
		It("stops cuts and claims of the fleet until Resume, also of a relay that starts later", func(ctx SpecContext) {
			publishEvents(ctx, db, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
			Expect(s.Pause(ctx, operator)).To(BeTrue())
			publishEvents(ctx, db, 1)
			for _, relay := range []*store.Store{s, newStore(db)} {
				Expect(relay.Cut(ctx, 0)).To(Equal(store.Cut{}))
				Expect(claimed(ctx, relay)).To(BeFalse())
				Expect(relay.Poll(ctx)).To(BeFalse())
				Expect(relay.Paused()).To(HaveField("By", operator))
			}
			Expect(s.ReadPause(ctx)).To(And(HaveField("By", operator), HaveField("At", BeTemporally("~", time.Now(), time.Hour))))

			Expect(s.Resume(ctx, operator)).To(BeTrue())
			Expect(s.ReadPause(ctx)).To(BeNil())
			Expect(s.Poll(ctx)).To(BeTrue())
			Expect(s.Paused()).To(BeNil())
			Expect(claimed(ctx, s)).To(BeTrue())
			Expect(audited(ctx)).To(Equal([]string{"resume {}", "pause {}"}))
		})

		It("does not end a lease", func(ctx SpecContext) {
			publishEvents(ctx, db, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
			lease := claim(ctx)
			Expect(s.Pause(ctx, operator)).To(BeTrue())
			Expect(lease.Settle(ctx)).To(Succeed())
		})

		It("changes and audits nothing the second time", func(ctx SpecContext) {
			Expect(s.Resume(ctx, operator)).To(BeFalse())
			Expect(s.Pause(ctx, operator)).To(BeTrue())
			Expect(s.Pause(ctx, "bob@laptop")).To(BeFalse())
			Expect(s.ReadPause(ctx)).To(HaveField("By", operator))
			Expect(audited(ctx)).To(Equal([]string{"pause {}"}))
		})

		It("works after the table was truncated", func(ctx SpecContext) {
			db.MustExecContext(ctx, "TRUNCATE outbox_pause")
			publishEvents(ctx, db, 1)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 1))
			Expect(s.Pause(ctx, operator)).To(BeTrue())
			Expect(claimed(ctx, s)).To(BeFalse())
		})
	})

	Describe("of a batch", func() {
		var id uuid.UUID

		BeforeEach(func(ctx SpecContext) {
			publishEvents(ctx, db, 2)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 2))
			Expect(db.GetContext(ctx, &id, "SELECT batch_id FROM outbox_batches")).To(Succeed())
		})

		It("show its state", func(ctx SpecContext) {
			Expect(state(ctx, id)).To(Equal(store.Unclaimed))
			lease := claim(ctx)
			Expect(state(ctx, id)).To(Equal(store.InFlight))
			Expect(lease.Retry(ctx, errors.New("the sink is down"), time.Hour)).To(Succeed())
			Expect(state(ctx, id)).To(Equal(store.PutOff))
			Expect(s.RetryBatch(ctx, operator, id)).To(Succeed())
			Expect(state(ctx, id)).To(Equal(store.Unclaimed))
			Expect(claim(ctx).Fail(ctx, errors.New("bad data"), time.Hour)).To(Succeed())
			Expect(state(ctx, id)).To(Equal(store.Failing))
			batch, err := s.Batch(ctx, id)
			Expect(err).NotTo(HaveOccurred())
			Expect(batch).To(And(HaveField("Events", 2), HaveField("Attempts", 2), HaveField("Failures", 1),
				HaveField("LastError", "bad data"), HaveField("EventIDs", "{[1,3)}")))
		})

		It("retry it at once", func(ctx SpecContext) {
			Expect(claim(ctx).Fail(ctx, errors.New("bad data"), time.Hour)).To(Succeed())
			Expect(claimed(ctx, s)).To(BeFalse())
			Expect(s.RetryBatch(ctx, operator, id)).To(Succeed())
			Expect(claim(ctx)).To(HaveField("Attempts", 2))
			Expect(audited(ctx)).To(Equal([]string{`batch_retry {"batch_id": "` + id.String() + `"}`}))
		})

		It("split it by making it a failing batch", func(ctx SpecContext) {
			Expect(claim(ctx).Retry(ctx, errors.New("too slow"), time.Hour)).To(Succeed())
			Expect(s.SplitBatch(ctx, operator, id)).To(Succeed())
			lease := claim(ctx)
			Expect(lease.Failures).To(Equal(1))
			Expect(lease.LastError).To(Equal("too slow"))
			Expect(audited(ctx)).To(Equal([]string{`batch_split {"batch_id": "` + id.String() + `"}`}))
		})

		DescribeTable("are refused", func(ctx SpecContext, prepare func(context.Context), split bool, why string) {
			prepare(ctx)
			var err error
			if split {
				err = s.SplitBatch(ctx, operator, id)
			} else {
				err = s.RetryBatch(ctx, operator, id)
			}
			Expect(err).To(MatchError(ContainSubstring(why)))
			Expect(audited(ctx)).To(BeEmpty())
		},
			Entry("while a worker attempts it", func(ctx context.Context) { claim(ctx) }, false, "a worker is attempting it"),
			Entry("if it was delivered", func(ctx context.Context) { Expect(claim(ctx).Settle(ctx)).To(Succeed()) }, false, "batch not found"),
			Entry("if it must wait for inserts of a lost history", func(ctx context.Context) {
				db.MustExecContext(ctx, "UPDATE outbox_batches SET attempts = 1, next_attempt_at = clock_timestamp() + interval '1 hour'")
			}, false, "waits for inserts of a lost history"),
			Entry("to split it if it was not attempted", func(context.Context) {}, true, "has not been attempted yet"),
			Entry("to split a single event", func(ctx context.Context) {
				db.MustExecContext(ctx, "UPDATE outbox_batches SET event_ids = '{[1,2)}', event_count = 1, attempts = 1, last_attempt_at = clock_timestamp()")
			}, true, "has one event"),
		)
	})

	Describe("The fleet", func() {
		It("has the relays that report themselves", func(ctx SpecContext) {
			one := store.Member{
				ID: uuid.New(), Host: "one", PID: 1, Version: "v1", Settings: store.MemberSettings{"relay.linger": "250ms"},
				State: store.MemberState{Circuit: "closed", Workers: 2},
			}
			two := one
			two.ID, two.Host, two.Settings = uuid.New(), "two", store.MemberSettings{"relay.linger": "1s"}
			for _, member := range []store.Member{one, two, one} {
				Expect(s.Report(ctx, member)).To(Succeed())
			}
			one.State.Ready = "sink: down"
			Expect(s.Report(ctx, one)).To(Succeed())
			fleet, err := s.Fleet(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(fleet).To(HaveExactElements(
				And(HaveField("Host", "one"), HaveField("State", one.State), HaveField("Settings", one.Settings), HaveField("IsSilent()", BeFalse())),
				HaveField("Host", "two")))
			Expect(store.Configurations(fleet)).To(HaveLen(2))

			By("silence")
			db.MustExecContext(ctx, "UPDATE outbox_relays SET seen_at = seen_at - interval '2 minutes' WHERE host = 'two'")
			fleet, err = s.Fleet(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(store.Running(fleet)).To(HaveExactElements(HaveField("Host", "one")))
			Expect(store.Configurations(store.Running(fleet))).To(HaveLen(1))

			By("an hour of silence, and a stop")
			db.MustExecContext(ctx, "UPDATE outbox_relays SET seen_at = seen_at - interval '2 hours' WHERE host = 'two'")
			Expect(s.Report(ctx, one)).To(Succeed())
			Expect(s.Fleet(ctx)).To(HaveExactElements(HaveField("Host", "one")))
			Expect(s.Leave(ctx, one.ID)).To(Succeed())
			Expect(s.Fleet(ctx)).To(BeEmpty())
		})
	})
})
