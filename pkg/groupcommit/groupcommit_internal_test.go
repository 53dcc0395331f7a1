package groupcommit

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/types"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

func TestGroupCommit(t *testing.T) {
	RegisterFailHandler(Fail)
	EnforceDefaultTimeoutsWhenUsingContexts()
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "groupcommit")
}

// deadline is a context. Its deadline passes when a spec closes the channel passed.
type deadline struct {
	context.Context

	passed chan struct{}
}

func (d deadline) Done() <-chan struct{} { return d.passed }

func (d deadline) Err() error {
	select {
	case <-d.passed:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

var _ = Describe("Group commit", func() {
	// outcome is the result of one call of Do.
	type outcome struct {
		item, result int
		err          error
	}

	var (
		committer *Committer[int, int]
		begun     chan []int // the items of each group
		commit    chan error // ends the commit of one group
		outcomes  chan outcome
	)

	BeforeEach(func() {
		// The channels are large enough that no goroutine blocks when a spec fails. A
		// group may outlive its spec by a moment, so each spec has its own channels.
		started, end := make(chan []int, 100), make(chan error, 100)
		begun, commit, outcomes = started, end, make(chan outcome, 100)
		committer = New(Options[int, int]{Commit: func(ctx context.Context, items []int) ([]int, error) {
			started <- items
			select {
			case err := <-end:
				if err != nil {
					return nil, err
				}
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
			results := make([]int, len(items))
			for i, item := range items {
				results[i] = 10 * item
			}
			return results, nil
		}})
		committer.slotTimeout = time.Hour
	})

	do := func(ctx context.Context, items ...int) {
		committer, outcomes := committer, outcomes
		for _, item := range items {
			go func() {
				result, err := committer.Do(ctx, item)
				outcomes <- outcome{item, result, err}
			}()
		}
	}

	waiting := func() int {
		committer.mu.Lock()
		defer committer.mu.Unlock()
		return len(committer.queue)
	}

	gathering := func() bool {
		committer.mu.Lock()
		defer committer.mu.Unlock()
		return committer.gathered != nil
	}

	freeSlots := func() int {
		committer.mu.Lock()
		defer committer.mu.Unlock()
		return committer.slots
	}

	// occupy fills every slot with a group of one change. free ends one of these
	// groups.
	occupy := func(ctx SpecContext) {
		GinkgoHelper()
		for i := range slots {
			do(ctx, -i-1)
			Eventually(ctx, begun).Should(Receive(HaveLen(1)))
		}
	}
	free := func(ctx SpecContext) {
		GinkgoHelper()
		commit <- nil
		Eventually(ctx, outcomes).Should(Receive())
	}

	// together puts the changes into one group. It returns after the group's commit
	// has begun.
	together := func(ctx SpecContext, changes ...func()) {
		GinkgoHelper()
		occupy(ctx)
		for _, change := range changes {
			change()
		}
		Eventually(ctx, waiting).Should(Equal(len(changes)))
		free(ctx)
		Eventually(ctx, begun).Should(Receive(HaveLen(len(changes))))
	}
	change := func(ctx context.Context, item int) func() { return func() { do(ctx, item) } }

	// expectEach expects n changes to end with the error.
	expectEach := func(ctx SpecContext, n int, err types.GomegaMatcher) {
		GinkgoHelper()
		for range n {
			var o outcome
			Eventually(ctx, outcomes).Should(Receive(&o))
			Expect(o.err).To(err)
			if o.err == nil {
				Expect(o.result).To(Equal(10 * o.item))
			}
		}
	}

	It("commits requests that arrive during a commit in one transaction, each with its own result", func(ctx SpecContext) {
		together(ctx, change(ctx, 1), change(ctx, 2), change(ctx, 3))
		for range slots {
			commit <- nil
		}
		expectEach(ctx, slots-1+3, Not(HaveOccurred()))
		Eventually(ctx, freeSlots).Should(Equal(slots))
	})

	Describe("after a group with requests in the queue behind it", func() {
		// expectThree ends a group of one change while two requests are in the queue.
		// Then it commits these two together with a third that arrives later.
		expectThree := func(ctx SpecContext) {
			GinkgoHelper()
			committer.gatherTimeout = time.Hour
			occupy(ctx)
			do(ctx, 1, 2)
			Eventually(ctx, waiting).Should(Equal(2))
			free(ctx)
			Eventually(ctx, gathering).Should(BeTrue())
			do(ctx, 3)
			Eventually(ctx, begun).Should(Receive(ConsistOf(1, 2, 3)))
			commit <- nil
			expectEach(ctx, 3, Not(HaveOccurred()))
		}

		It("waits for the same number of requests", func(ctx SpecContext) {
			expectThree(ctx)
			do(ctx, 4, 5, 6)
			Eventually(ctx, begun).Should(Receive(ConsistOf(4, 5, 6)))
		})

		It("stops waiting when the leader's client leaves", func(ctx SpecContext) {
			expectThree(ctx)
			gone, leave := context.WithCancel(ctx)
			do(gone, 4)
			Eventually(ctx, gathering).Should(BeTrue())
			do(ctx, 5)
			Eventually(ctx, waiting).Should(Equal(1))
			leave()
			Eventually(ctx, begun).Should(Receive(ConsistOf(5)))
		})
	})

	It("waits less often if no requests arrive", func(ctx SpecContext) {
		committer.gatherTimeout = time.Nanosecond
		var waits []int // the groups that waited in vain
		for n := range 100 {
			committer.mu.Lock()
			committer.expected = 2
			before := committer.skips
			committer.mu.Unlock()
			do(ctx, 1)
			Eventually(ctx, begun).Should(Receive(HaveLen(1)))
			free(ctx)
			Eventually(ctx, freeSlots).Should(Equal(slots))
			committer.mu.Lock()
			if committer.skips > before {
				waits = append(waits, n)
			}
			committer.mu.Unlock()
		}
		Expect(waits).To(Equal([]int{0, 2, 6, 14, 30, 62}))
	})

	It("starts the next group if a group does not end within the slot timeout", func(ctx SpecContext) {
		committer.slotTimeout = time.Millisecond
		for range 5 * slots { // no group ends
			do(ctx, 1)
			Eventually(ctx, begun).Should(Receive(HaveLen(1)))
		}
	})

	DescribeTable("gives all requests of a group the same error", func(ctx SpecContext, failure, expected error) {
		together(ctx, change(ctx, 1), change(ctx, 2))
		for range slots {
			commit <- failure
		}
		expectEach(ctx, slots-1+2, MatchError(expected))
	},
		Entry("if the outcome is unknown", errors.Join(postgres.ErrOutcomeUnknown, &pq.Error{Code: "08006"}), postgres.ErrOutcomeUnknown),
		Entry("if PostgreSQL is unavailable", errShutdown, errShutdown),
		Entry("if PostgreSQL refuses the transaction", &pq.Error{Code: "55P03"}, ErrCommitAlone),
	)

	It("does not cancel a group while one of its clients waits", func(ctx SpecContext) {
		gone, leave := context.WithCancel(ctx)
		together(ctx, change(gone, 1), change(ctx, 2))
		leave()
		for range slots {
			commit <- nil
		}
		expectEach(ctx, slots-1+2, Not(HaveOccurred()))
	})

	It("cancels a group when none of its clients waits", func(ctx SpecContext) {
		gone, leave := context.WithCancel(ctx)
		together(ctx, change(gone, 1), change(gone, 2))
		leave()
		expectEach(ctx, 2, MatchError(context.Canceled))
	})

	It("cancels a group at the first deadline of its requests", func(ctx SpecContext) {
		short := deadline{Context: ctx, passed: make(chan struct{})}
		together(ctx, change(short, 1), change(ctx, 2))
		close(short.passed)
		expectEach(ctx, 2, MatchError(context.DeadlineExceeded))
	})

	It("lets a request whose deadline is near commit alone, so that it does not end the group", func(ctx SpecContext) {
		committer.o.MinTime = time.Hour
		hurried, cancel := context.WithTimeout(ctx, time.Hour-time.Minute)
		defer cancel()
		_, err := committer.Do(hurried, 1)
		Expect(err).To(MatchError(ErrCommitAlone))
		Expect(begun).NotTo(Receive())
		commit <- nil
		patient, cancel := context.WithTimeout(ctx, 2*time.Hour)
		defer cancel()
		Expect(committer.Do(patient, 2)).To(Equal(20))
	})

	It("has one change with a key in a group, and lets the others commit alone", func(ctx SpecContext) {
		committer.o.Key = func(item int) string { return map[bool]string{true: "key"}[item > 2] }
		occupy(ctx)
		do(ctx, 1, 2, 3, 3, 3)
		Eventually(ctx, waiting).Should(Equal(5))
		free(ctx)
		Eventually(ctx, begun).Should(Receive(ConsistOf(1, 2, 3)))
		expectEach(ctx, 2, MatchError(ErrCommitAlone))
		commit <- nil
		expectEach(ctx, 3, Not(HaveOccurred()))
	})

	It("drops a request from the queue when its client leaves", func(ctx SpecContext) {
		occupy(ctx)
		gone, leave := context.WithCancel(ctx)
		do(gone, 1)
		Eventually(ctx, waiting).Should(Equal(1))
		leave()
		expectEach(ctx, 1, MatchError(context.Canceled))
		Expect(waiting()).To(BeZero())
	})

	It("returns an error to the other requests of a group if their leader panics", func(ctx SpecContext) {
		occupy(ctx)
		committer.o.Commit = func(context.Context, []int) ([]int, error) { panic("a bug") }
		committer, ended := committer, make(chan error, 3)
		for range cap(ended) {
			go func() {
				err := errors.New("panicked")
				defer func() {
					_ = recover()
					ended <- err
				}()
				_, err = committer.Do(ctx, 1)
			}()
		}
		Eventually(ctx, waiting).Should(Equal(cap(ended)))
		free(ctx)
		var errs []error
		for range cap(ended) {
			var err error
			Eventually(ctx, ended).Should(Receive(&err))
			errs = append(errs, err)
		}
		Expect(errs).To(ConsistOf(MatchError("panicked"), MatchError(ErrLeaderPanicked), MatchError(ErrLeaderPanicked)))
		Expect(waiting()).To(BeZero())
	})
})

var errShutdown = &pq.Error{Code: "57P01"}
