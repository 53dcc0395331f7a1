package relay

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

var _ = Describe("The watchdog's judgement", func() {
	const looks = 5 // after which an item that has not changed is stalled

	var r *Relay

	BeforeEach(func() {
		r = &Relay{
			o:        Options{Store: store.New(nil, store.Options{}), Workers: 1},
			postgres: newPostgresState(),
			circuit:  newCircuit(nil, backoff{}, slog.New(slog.DiscardHandler)),
			watchdog: newWatchdog(0),
		}
		r.circuit.idle(GinkgoT().Context())
		r.circuit.cause = nil
		// Without a reason, an item is stalled after the flush timeout and its margin.
		r.o.FlushTimeout = watchPatience - watchMargin
	})

	event := store.WaitingEvent{ID: 7, Age: time.Minute}

	batch := func(n, attempts int) store.WaitingBatch {
		return store.WaitingBatch{
			ID: uuid.UUID{15: byte(n)}, Attempts: attempts, SinceAttempt: -1, Age: time.Minute,
			State: fmt.Sprint("token ", attempts),
		}
	}

	failing := func(b store.WaitingBatch) store.WaitingBatch {
		b.Failures = 1
		return b
	}

	// judge returns the result of the last of these looks.
	judge := func(looks ...store.Waiting) error {
		var last store.Waiting
		for _, last = range looks {
			r.watchdog.look(last, r.fault())
		}
		if found := (&inspection{Relay: r, waiting: last}).run(); found != nil {
			return found
		}
		return nil
	}

	same := func(n int, waiting store.Waiting) (looks []store.Waiting) {
		for range n {
			looks = append(looks, waiting)
		}
		return looks
	}

	It("finds an event that has not changed", func() {
		waiting := store.Waiting{Events: []store.WaitingEvent{event}}
		Expect(judge(same(looks-1, waiting)...)).To(Succeed())
		Expect(judge(waiting)).To(MatchError(
			"stalled: event 7, published 1m0s ago, is in no batch: no obstacle is known to this relay (batches: 0 delivering, 0 of them without an attempt, 0 failing)"))
	})

	It("waits for the linger", func() {
		r.o.Linger = time.Minute
		waiting := store.Waiting{Events: []store.WaitingEvent{event}}
		Expect(judge(same(looks+2, waiting)...)).To(Succeed())
		Expect(judge(waiting)).NotTo(Succeed())
	})

	It("waits for two polls", func() {
		r.watchdog = newWatchdog(time.Minute)
		waiting := store.Waiting{Events: []store.WaitingEvent{event}, Failing: 4096}
		Expect(judge(same(looks+8, waiting)...)).To(Succeed())
		Expect(judge(waiting)).NotTo(Succeed())
	})

	It("waits for the longest insert, if no obstacle is known", func() {
		r.o.FlushTimeout += time.Minute
		waiting := store.Waiting{Events: []store.WaitingEvent{event}}
		Expect(judge(same(looks+5, waiting)...)).To(Succeed())
		r.busy.Store(1)
		Expect(judge(waiting)).To(MatchError(ContainSubstring("all 1 workers of this relay are busy")))
	})

	It("judges the first batch of a line only", func() {
		var drained []store.Waiting
		for n := range 3 * looks {
			var waiting store.Waiting
			for i := n; i < 4*looks; i++ {
				waiting.Batches = append(waiting.Batches, batch(i, 0))
			}
			drained = append(drained, waiting)
		}
		Expect(judge(drained...)).To(Succeed())
		last := drained[len(drained)-1]
		Expect(judge(same(looks-1, last)...)).To(MatchError(And(
			ContainSubstring(last.Batches[0].ID.String()), Not(ContainSubstring(last.Batches[1].ID.String())))))
	})

	It("finds a batch that no worker can claim in front of others that are delivered", func() {
		elsewhere := batch(0, 1)
		elsewhere.Destination = "elsewhere"
		r.o.Store.SetDestination("here")
		var drained []store.Waiting
		for n := 1; n <= looks; n++ {
			drained = append(drained, store.Waiting{Batches: []store.WaitingBatch{elsewhere, batch(n, 0), batch(n+1, 0)}})
		}
		Expect(judge(drained[:looks-1]...)).To(Succeed())
		Expect(judge(drained[looks-1])).To(MatchError(And(
			ContainSubstring("its first attempt went to another destination, elsewhere"), Not(ContainSubstring("waits for attempt 1")))))
	})

	It("does not count a batch that is attempted", func() {
		for n := range 3 * looks {
			Expect(judge(store.Waiting{Batches: []store.WaitingBatch{batch(1, n)}})).To(Succeed())
		}
	})

	It("judges failing batches in a line of their own", func() {
		Expect(judge(same(looks, store.Waiting{Batches: []store.WaitingBatch{failing(batch(2, 3))}})...)).To(
			MatchError(ContainSubstring("waits for attempt 4")))
		for n := range looks {
			judged := judge(store.Waiting{Batches: []store.WaitingBatch{batch(1, n), failing(batch(2, 3))}})
			Expect(judged).To(MatchError(And(ContainSubstring("waits for attempt 4"), Not(ContainSubstring(batch(1, 0).ID.String())))))
		}
	})

	It("lets an event wait behind batches", func() {
		waiting := store.Waiting{Events: []store.WaitingEvent{event}, Delivering: 1, Unattempted: 1}
		Expect(judge(same(queuePatience*(looks-1), waiting)...)).To(Succeed())
		Expect(judge(waiting)).To(MatchError(ContainSubstring("1 batches wait for their first attempt")))
	})

	It("gives only the fault as the reason while a database fails", func() {
		r.circuit.cause = errors.New("no route")
		waiting := store.Waiting{Events: []store.WaitingEvent{event}, Delivering: 1, Unattempted: 1}
		judged := judge(same(queuePatience*looks, waiting)...)
		Expect(judged).To(MatchError(And(ContainSubstring("is in no batch: sink: no route ("), Not(ContainSubstring("1 batches wait for their first attempt")))))
		stall, ok := errors.AsType[*stalledError](judged)
		Expect(ok).To(BeTrue())
		Expect(stall.fault).To(BeTrue())
	})

	It("waits again after a database has failed", func() {
		r.circuit.cause = errors.New("no route")
		waiting := store.Waiting{Events: []store.WaitingEvent{event}}
		Expect(judge(same(looks, waiting)...)).NotTo(Succeed())
		r.circuit.cause = nil
		Expect(judge(same(looks-1, waiting)...)).To(Succeed())
		Expect(judge(waiting)).To(MatchError(ContainSubstring("no obstacle is known to this relay")))
	})

	It("says that failing batches prevent cuts", func() {
		waiting := store.Waiting{Events: []store.WaitingEvent{event}, Failing: 4096}
		Expect(judge(same(looks, waiting)...)).To(MatchError(ContainSubstring("no batches are cut because 4096 batches are failing")))
	})

	It("names three stalls, and the number of the others", func() {
		var waiting store.Waiting
		for n := range 5 {
			far := batch(n, 1)
			far.Delay = time.Hour
			waiting.Batches = append(waiting.Batches, far)
		}
		Expect(judge(same(looks, waiting)...)).To(MatchError(And(
			ContainSubstring("its next attempt is due in 1h0m0s, which is longer than any delay"),
			HaveSuffix("; and 2 more"), Not(ContainSubstring(waiting.Batches[3].ID.String())))))
	})
})
