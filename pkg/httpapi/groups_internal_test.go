package httpapi

import (
	"context"
	"errors"
	"time"

	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/types"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("Changes that come at once", func() {
	// outcome is what became of one change.
	type outcome struct {
		item, result int
		err          error
	}

	var (
		groups   *groups[int, int]
		begun    chan []int // the items of each group
		commit   chan error // lets one group go on, or fail
		outcomes chan outcome
	)

	BeforeEach(func() {
		// With room for all, so that nothing is left to wait when a spec fails. The
		// groups of a spec may outlive it by a moment: they have its channels.
		started, end := make(chan []int, 100), make(chan error, 100)
		begun, commit, outcomes = started, end, make(chan outcome, 100)
		groups = newGroups(func(ctx context.Context, items []int) ([]int, error) {
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
		})
		groups.patience = time.Hour
	})

	do := func(ctx context.Context, items ...int) {
		groups, outcomes := groups, outcomes
		for _, item := range items {
			go func() {
				result, err := groups.do(ctx, item)
				outcomes <- outcome{item, result, err}
			}()
		}
	}

	waiting := func() int {
		groups.mu.Lock()
		defer groups.mu.Unlock()
		return len(groups.queue)
	}

	gathering := func() bool {
		groups.mu.Lock()
		defer groups.mu.Unlock()
		return groups.gathered != nil
	}

	ways := func() int {
		groups.mu.Lock()
		defer groups.mu.Unlock()
		return groups.ways
	}

	// occupy takes every way, with a group of one each; free ends one of them.
	occupy := func(ctx SpecContext) {
		GinkgoHelper()
		for i := range groupWays {
			do(ctx, -i-1)
			Eventually(ctx, begun).Should(Receive(HaveLen(1)))
		}
	}
	free := func(ctx SpecContext) {
		GinkgoHelper()
		commit <- nil
		Eventually(ctx, outcomes).Should(Receive())
	}

	// together has the changes made in one group, which is on its way then.
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

	// expectEach expects n changes to end, with that error.
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

	It("share a transaction if they come while others are on their way, and each has its own result", func(ctx SpecContext) {
		together(ctx, change(ctx, 1), change(ctx, 2), change(ctx, 3))
		for range groupWays {
			commit <- nil
		}
		expectEach(ctx, groupWays-1+3, Not(HaveOccurred()))
		Eventually(ctx, ways).Should(Equal(groupWays))
	})

	Describe("after a group", func() {
		// ofOne ends a group of one, behind which two have waited, and these go with
		// the one that comes back.
		ofOne := func(ctx SpecContext) {
			GinkgoHelper()
			groups.gathering = time.Hour
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

		It("wait for those whom it has answered", func(ctx SpecContext) {
			ofOne(ctx)
			do(ctx, 4, 5, 6)
			Eventually(ctx, begun).Should(Receive(ConsistOf(4, 5, 6)))
		})

		It("wait for them no longer than their leader's client", func(ctx SpecContext) {
			ofOne(ctx)
			gone, leave := context.WithCancel(ctx)
			do(gone, 4)
			Eventually(ctx, gathering).Should(BeTrue())
			do(ctx, 5)
			Eventually(ctx, waiting).Should(Equal(1))
			leave()
			Eventually(ctx, begun).Should(Receive(ConsistOf(5)))
		})
	})

	It("wait for others ever more seldom where none come", func(ctx SpecContext) {
		groups.gathering = time.Nanosecond
		var waits []int // after so many groups
		for n := range 100 {
			groups.mu.Lock()
			groups.expected = 2
			before := groups.pass
			groups.mu.Unlock()
			do(ctx, 1)
			Eventually(ctx, begun).Should(Receive(HaveLen(1)))
			free(ctx)
			Eventually(ctx, ways).Should(Equal(groupWays))
			groups.mu.Lock()
			if groups.pass > before {
				waits = append(waits, n)
			}
			groups.mu.Unlock()
		}
		Expect(waits).To(Equal([]int{0, 2, 6, 14, 30, 62}))
	})

	It("go on beside groups that do not get on", func(ctx SpecContext) {
		groups.patience = time.Millisecond
		for range 5 * groupWays { // none of which ends
			do(ctx, 1)
			Eventually(ctx, begun).Should(Receive(HaveLen(1)))
		}
	})

	DescribeTable("have one fate", func(ctx SpecContext, failure, expected error) {
		together(ctx, change(ctx, 1), change(ctx, 2))
		for range groupWays {
			commit <- failure
		}
		expectEach(ctx, groupWays-1+2, MatchError(expected))
	},
		Entry("where nobody knows it", errors.Join(postgres.ErrOutcomeUnknown, &pq.Error{Code: "08006"}), postgres.ErrOutcomeUnknown),
		Entry("where PostgreSQL is not there", errShutdown, errShutdown),
		Entry("where PostgreSQL refuses one: each goes alone", &pq.Error{Code: "55P03"}, errGoAlone),
	)

	It("are not given up as long as one client waits", func(ctx SpecContext) {
		gone, leave := context.WithCancel(ctx)
		together(ctx, change(gone, 1), change(ctx, 2))
		leave()
		for range groupWays {
			commit <- nil
		}
		expectEach(ctx, groupWays-1+2, Not(HaveOccurred()))
	})

	It("are given up when nobody waits for them any more", func(ctx SpecContext) {
		gone, leave := context.WithCancel(ctx)
		together(ctx, change(gone, 1), change(gone, 2))
		leave()
		expectEach(ctx, 2, MatchError(context.Canceled))
	})

	It("end in time for the first of them whose time is up", func(ctx SpecContext) {
		short, expire := context.WithCancelCause(ctx)
		together(ctx, change(short, 1), change(ctx, 2))
		expire(errRequestTimeout)
		expectEach(ctx, 2, MatchError(errRequestTimeout))
	})

	It("do not wait for their turn longer than their clients", func(ctx SpecContext) {
		occupy(ctx)
		gone, leave := context.WithCancel(ctx)
		do(gone, 1)
		Eventually(ctx, waiting).Should(Equal(1))
		leave()
		expectEach(ctx, 1, MatchError(context.Canceled))
		Expect(waiting()).To(BeZero())
	})

	It("are not made again where the one that leads them panics", func(ctx SpecContext) {
		occupy(ctx)
		groups.commit = func(context.Context, []int) ([]int, error) { panic("a bug") }
		groups, ended := groups, make(chan error, 3)
		for range cap(ended) {
			go func() {
				err := errors.New("panicked")
				defer func() {
					_ = recover()
					ended <- err
				}()
				_, err = groups.do(ctx, 1)
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
		Expect(errs).To(ConsistOf(MatchError("panicked"), MatchError(errLeaderPanicked), MatchError(errLeaderPanicked)))
		Expect(waiting()).To(BeZero())
	})
})

var errShutdown = &pq.Error{Code: "57P01"}
