package admin_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/pkg/admin"
)

func TestAdmin(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyTimeout(30 * time.Second)
	RunSpecs(t, "admin")
}

type answer struct {
	status      int
	contentType string
	body        string
}

func get(ctx context.Context, method, url string) answer {
	GinkgoHelper()
	request, err := http.NewRequestWithContext(ctx, method, url, http.NoBody)
	Expect(err).NotTo(HaveOccurred())
	response, err := http.DefaultClient.Do(request)
	Expect(err).NotTo(HaveOccurred())
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	Expect(err).NotTo(HaveOccurred())
	return answer{response.StatusCode, response.Header.Get("Content-Type"), string(body)}
}

var _ = Describe("The admin port", func() {
	var registry *prometheus.Registry

	BeforeEach(func() { registry = prometheus.NewRegistry() })

	// start serves the checks until the spec ends, and returns the URL.
	start := func(ctx context.Context, checks ...admin.Check) string {
		GinkgoHelper()
		server := admin.New(admin.Options{
			Addr: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler), Registry: registry, Version: "1.2.3", Ready: checks,
		})
		Expect(server.Addr()).To(BeEmpty())
		running, stop := context.WithCancel(context.WithoutCancel(ctx))
		ended := make(chan error, 1)
		go func() { ended <- server.Run(running) }()
		DeferCleanup(func() {
			http.DefaultClient.CloseIdleConnections()
			stop()
			Eventually(ended).Should(Receive(BeNil()))
		})
		Eventually(server.Addr).ShouldNot(BeEmpty())
		return "http://" + server.Addr()
	}

	healthy := func(context.Context) error { return nil }
	failing := func(context.Context) error { return errors.New("connection refused") }

	It("is alive whatever the checks say", func(ctx SpecContext) {
		url := start(ctx, admin.Check{Name: "postgresql", Func: failing})
		Expect(get(ctx, http.MethodGet, url+"/livez")).To(Equal(answer{http.StatusOK, "application/json", `{"status":"ok"}` + "\n"}))
	})

	It("is ready when every check passes", func(ctx SpecContext) {
		url := start(ctx, admin.Check{Name: "postgresql", Func: healthy}, admin.Check{Name: "sink", Func: healthy})
		ready := get(ctx, http.MethodGet, url+"/readyz")
		Expect(ready.status).To(Equal(http.StatusOK))
		Expect(ready.body).To(MatchJSON(`{"status": "ok", "checks": {"postgresql": {"status": "ok"}, "sink": {"status": "ok"}}}`))
	})

	It("is not ready when a check fails, and says which and why", func(ctx SpecContext) {
		url := start(ctx, admin.Check{Name: "postgresql", Func: failing}, admin.Check{Name: "sink", Func: healthy})
		ready := get(ctx, http.MethodGet, url+"/readyz")
		Expect(ready.status).To(Equal(http.StatusServiceUnavailable))
		Expect(ready.body).To(MatchJSON(`{"status": "failing", "checks": {
			"postgresql": {"status": "failing", "error": "connection refused"}, "sink": {"status": "ok"}}}`))
	})

	It("does not wait for a check that hangs, and does not start it again meanwhile", func(ctx SpecContext) {
		var calls atomic.Int32
		release := make(chan struct{})
		url := start(ctx, admin.Check{Name: "postgresql", Func: func(context.Context) error {
			calls.Add(1)
			<-release
			return nil
		}})
		for range 2 {
			ready := get(ctx, http.MethodGet, url+"/readyz")
			Expect(ready.status).To(Equal(http.StatusServiceUnavailable))
			Expect(ready.body).To(ContainSubstring("no answer within"))
		}
		Expect(calls.Load()).To(Equal(int32(1)))
		close(release)
		Eventually(func() int { return get(ctx, http.MethodGet, url+"/readyz").status }).Should(Equal(http.StatusOK))
	})

	It("gives each check a deadline", func(ctx SpecContext) {
		url := start(ctx, admin.Check{Name: "postgresql", Func: func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}})
		ready := get(ctx, http.MethodGet, url+"/readyz")
		Expect(ready.status).To(Equal(http.StatusServiceUnavailable))
		Expect(ready.body).To(ContainSubstring("no answer within"))
	})

	It("shows the metrics of the program, the process and the build", func(ctx SpecContext) {
		gauge := prometheus.NewGauge(prometheus.GaugeOpts{Name: "diehard_test", Help: "A test."})
		gauge.Set(42)
		registry.MustRegister(gauge)
		shown := get(ctx, http.MethodGet, start(ctx)+"/metrics")
		Expect(shown.status).To(Equal(http.StatusOK))
		Expect(shown.contentType).To(HavePrefix("text/plain"))
		for _, line := range []string{
			"diehard_test 42\n", "diehard_build_info{version=\"1.2.3\"} 1\n", "\ngo_goroutines ", "\npromhttp_metric_handler_requests_in_flight 1\n",
		} {
			Expect(shown.body).To(ContainSubstring(line))
		}
	})

	It("shows the other metrics when a collector fails", func(ctx SpecContext) {
		registry.MustRegister(broken{})
		shown := get(ctx, http.MethodGet, start(ctx)+"/metrics")
		Expect(shown.status).To(Equal(http.StatusOK))
		Expect(shown.body).To(ContainSubstring("diehard_build_info"))
		Expect(shown.body).NotTo(ContainSubstring("diehard_broken"))
	})

	DescribeTable("has nothing else", func(ctx SpecContext, method, path string, status int) {
		Expect(get(ctx, method, start(ctx)+path).status).To(Equal(status))
	},
		Entry(nil, http.MethodGet, "/", http.StatusNotFound),
		Entry(nil, http.MethodGet, "/debug/pprof/", http.StatusNotFound),
		Entry(nil, http.MethodPost, "/readyz", http.StatusMethodNotAllowed),
	)

	It("cannot have an address that is taken", func(ctx SpecContext) {
		taken, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(taken.Close)
		server := admin.New(admin.Options{Addr: taken.Addr().String(), Log: slog.New(slog.DiscardHandler), Registry: registry})
		Expect(server.Run(ctx)).To(MatchError(ContainSubstring("address already in use")))
	})

	It("finishes a request that is under way when it is told to stop", func(ctx SpecContext) {
		asked, release := make(chan struct{}), make(chan struct{})
		server := admin.New(admin.Options{
			Addr: "127.0.0.1:0", Log: slog.New(slog.DiscardHandler), Registry: registry,
			Ready: []admin.Check{{Name: "slow", Func: func(context.Context) error {
				close(asked)
				<-release
				return nil
			}}},
		})
		running, stop := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() { ended <- server.Run(running) }()
		Eventually(server.Addr).ShouldNot(BeEmpty())
		statuses := make(chan int, 1)
		go func() {
			defer GinkgoRecover()
			statuses <- get(ctx, http.MethodGet, "http://"+server.Addr()+"/readyz").status
		}()
		Eventually(asked).Should(BeClosed())
		stop()
		close(release)
		Eventually(statuses).Should(Receive(Equal(http.StatusOK)))
		Eventually(ended).Should(Receive(BeNil()))
	})
})

// broken is a collector that fails.
type broken struct{}

func (broken) Describe(descs chan<- *prometheus.Desc) { descs <- brokenDesc }

func (broken) Collect(samples chan<- prometheus.Metric) {
	samples <- prometheus.NewInvalidMetric(brokenDesc, errors.New("broken"))
}

var brokenDesc = prometheus.NewDesc("diehard_broken", "Fails.", nil, nil)
