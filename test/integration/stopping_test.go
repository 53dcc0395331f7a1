package integration_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

// createOnce creates a user over a new connection, and returns the status.
func createOnce(ctx context.Context, api *programs.Process, name string) (int, error) {
	GinkgoHelper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, api.URL()+"/v1/users", strings.NewReader(`{"email":"`+name+`@example.com"}`))
	Expect(err).NotTo(HaveOccurred())
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return 0, err
	}
	return response.StatusCode, response.Body.Close()
}

var _ = Describe("An API that stops", func() {
	It("is not ready at once, and accepts connections until the drain delay has passed", func(ctx SpecContext) {
		api := newSystem(ctx).API("DIEHARD_HTTP_DRAIN_DELAY=10m")
		api.Signal(syscall.SIGTERM)
		Eventually(ctx, api.Ready).WithTimeout(patience).Should(Equal(http.StatusServiceUnavailable))
		for n := range 10 {
			Expect(createOnce(ctx, api, fmt.Sprint("late", n))).To(Equal(http.StatusCreated))
		}
		api.Kill()
	})

	It("stops after the drain delay, and after Ctrl-C without the delay", func(ctx SpecContext) {
		s := newSystem(ctx)
		s.API("DIEHARD_HTTP_DRAIN_DELAY=100ms").Stop()
		interrupted := s.API("DIEHARD_HTTP_DRAIN_DELAY=10m")
		interrupted.Signal(os.Interrupt)
		interrupted.Ended()
	})
})

var _ = Describe("An event at outbox.max_event_bytes", func() {
	It("fits into a request, and a larger one breaks the rule for events", func(ctx SpecContext) {
		const limit = 1 << 20
		api := newSystem(ctx).API(fmt.Sprint("DIEHARD_OUTBOX_MAX_EVENT_BYTES=", limit))
		publish := func(size int) int {
			GinkgoHelper()
			body := json.RawMessage(`{"event_type":"a","event_context":"` + strings.Repeat("x", size-2) + `"}`)
			response, err := system.Post(ctx, api.URL()+"/v1/events", body)
			Expect(err).NotTo(HaveOccurred())
			return response.Status
		}
		Expect(publish(limit)).To(Equal(http.StatusAccepted))
		Expect(publish(limit + 1)).To(Equal(http.StatusUnprocessableEntity))
	})
})

var _ = Describe("An API whose connections wait for locks", func() {
	It("stays ready", func(ctx SpecContext) {
		s := newSystem(ctx)
		api := s.API("DIEHARD_POSTGRES_MAX_OPEN_CONNS=2")
		holder, err := s.Postgres.BeginTxx(ctx, nil)
		Expect(err).NotTo(HaveOccurred())
		defer func() { _ = holder.Rollback() }()
		_, err = holder.ExecContext(ctx, "LOCK TABLE users")
		Expect(err).NotTo(HaveOccurred())

		asking, stop := context.WithCancel(ctx)
		var clients sync.WaitGroup
		for n := range 50 {
			clients.Go(func() {
				for asking.Err() == nil {
					_, _ = createOnce(asking, api, fmt.Sprint("user", n))
				}
			})
		}
		defer func() {
			stop()
			clients.Wait()
		}()
		Eventually(ctx, func(g Gomega) {
			var waiting int
			g.Expect(s.Postgres.GetContext(ctx, &waiting, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")).To(Succeed())
			g.Expect(waiting).To(Equal(2))
		}).WithTimeout(patience).Should(Succeed())
		for range 20 {
			Expect(api.Ready()).To(Equal(http.StatusOK))
		}
	})
})
