package admission

import (
	"context"
	"errors"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

var _ = Describe("The queue of a shedder", func() {
	var (
		shedder *Shedder
		release chan struct{}
		order   chan int // of the requests in progress
	)

	BeforeEach(func() {
		shedder = NewShedder(ShedderOptions{
			MaxConcurrent: 1, MaxWait: time.Hour,
			Ping:     func(context.Context) error { return nil },
			IsOutage: func(context.Context, error) bool { return true },
		})
		release, order = make(chan struct{}), make(chan int, 10)
	})

	nothing := func() error { return nil }

	// enter starts a request that is in progress until release.
	enter := func(ctx context.Context, i int) <-chan error {
		shedder, release, order := shedder, release, order
		result := make(chan error, 1)
		go func() {
			result <- shedder.Do(ctx, func() error {
				order <- i
				<-release
				return nil
			})
		}()
		return result
	}

	It("serves waiting requests in their order", func(ctx SpecContext) {
		results := []<-chan error{enter(ctx, 0)}
		Eventually(ctx, order).Should(Receive(Equal(0)))
		for i := 1; i < 4; i++ {
			results = append(results, enter(ctx, i))
			Eventually(ctx, shedder.Waiting).Should(Equal(i))
		}
		for i := 1; i < 4; i++ {
			release <- struct{}{}
			Eventually(ctx, order).Should(Receive(Equal(i)))
		}
		close(release)
		for _, result := range results {
			Eventually(ctx, result).Should(Receive(Succeed()))
		}
		Expect(shedder.Waiting()).To(BeZero())
	})

	It("tells each client that it sheds a later time, of at most ten seconds", func() {
		shedder.duration = time.Second
		for _, seconds := range []int{4, 5, 6, 7, 8, 9, 10, 10, 10} { // 3 requests wait
			Expect(shedder.shed(3)).To(HaveField("RetryAfter", BeElementOf(seconds-1, seconds)))
		}
	})

	It("sheds requests that would wait too long", func(ctx SpecContext) {
		shedder.duration, shedder.o.MaxWait = time.Hour, 2*time.Hour
		first := enter(ctx, 0)
		Eventually(ctx, order).Should(Receive())
		others := []<-chan error{enter(ctx, 1), enter(ctx, 2)}
		Eventually(ctx, shedder.Waiting).Should(Equal(2))
		Expect(shedder.Do(ctx, nothing)).To(HaveField("Kind", problem.Overloaded))
		close(release)
		for _, result := range append(others, first) {
			Eventually(ctx, result).Should(Receive(Succeed()))
		}
	})

	It("sheds a request that has waited for MaxWait", func(ctx SpecContext) {
		shedder.o.MaxWait = time.Millisecond
		first := enter(ctx, 0)
		Eventually(ctx, order).Should(Receive())
		Expect(shedder.Do(ctx, nothing)).To(And(HaveField("Kind", problem.Overloaded), HaveField("RetryAfter", 1)))
		close(release)
		Eventually(ctx, first).Should(Receive(Succeed()))
	})

	It("limits the requests that wait", func(ctx SpecContext) {
		first := enter(ctx, 0)
		Eventually(ctx, order).Should(Receive())
		gone, leave := context.WithCancel(ctx)
		var waiting []<-chan error
		for range maxWaiting {
			waiting = append(waiting, enter(gone, 1))
		}
		Eventually(ctx, shedder.Waiting).Should(Equal(maxWaiting))
		Expect(shedder.Do(ctx, nothing)).To(HaveField("Kind", problem.Overloaded))
		leave()
		for _, result := range waiting {
			Eventually(ctx, result).Should(Receive(MatchError(context.Canceled)))
		}
		close(release)
		Eventually(ctx, first).Should(Receive(Succeed()))
	})

	It("refuses waiting requests when the database is unresponsive", func(ctx SpecContext) {
		first := enter(ctx, 0)
		Eventually(ctx, order).Should(Receive())
		second := enter(ctx, 1)
		Eventually(ctx, shedder.Waiting).Should(Equal(1))
		shedder.unresponsive.Store(true)
		close(release)
		Eventually(ctx, first).Should(Receive(Succeed()))
		Eventually(ctx, second).Should(Receive(HaveField("Kind", problem.Unavailable)))
		Expect(order).To(BeEmpty())
	})

	It("averages the time in progress", func() {
		Expect(shedder.Do(context.Background(), nothing)).To(Succeed())
		for range 10 * samples {
			shedder.learn(time.Second)
		}
		Expect(shedder.expectedWait(3)).To(BeNumerically("~", 3*time.Second, 10*time.Millisecond))
		Expect(shedder.Do(context.Background(), func() error { return errors.New("a failure") })).NotTo(Succeed())
	})
})
