package admin_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/pkg/admin"
)

func TestAdmin(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyTimeout(30 * time.Second)
	RunSpecs(t, "admin")
}

type response struct {
	status      int
	contentType string
	body        string
}

func get(ctx context.Context, method, url string) response {
	GinkgoHelper()
	request, err := http.NewRequestWithContext(ctx, method, url, http.NoBody)
	Expect(err).NotTo(HaveOccurred())
	received, err := http.DefaultClient.Do(request)
	Expect(err).NotTo(HaveOccurred())
	defer received.Body.Close()
	body, err := io.ReadAll(received.Body)
	Expect(err).NotTo(HaveOccurred())
	return response{received.StatusCode, received.Header.Get("Content-Type"), string(body)}
}

var _ = Describe("The admin port", func() {
	var (
		registry *prometheus.Registry
		log      *gbytes.Buffer
	)

	BeforeEach(func() {
		registry = prometheus.NewRegistry()
		log = gbytes.NewBuffer()
	})

	newServer := func(addr string, checks ...admin.Check) *admin.Server {
		return admin.New(admin.Options{
			Addr: addr, Log: slog.New(slog.NewTextHandler(log, nil)), Registry: registry, Version: "1.2.3", Ready: checks,
		})
	}

	// start serves the checks until the spec ends and returns the URL.
	start := func(ctx context.Context, checks ...admin.Check) string {
		GinkgoHelper()
		server := newServer("127.0.0.1:0", checks...)
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

	It("is alive even if a check fails", func(ctx SpecContext) {
		url := start(ctx, admin.Check{Name: "postgresql", Func: failing})
		Expect(get(ctx, http.MethodGet, url+"/livez")).To(Equal(response{http.StatusOK, "application/json", `{"status":"ok"}` + "\n"}))
	})

	It("is ready if every check passes", func(ctx SpecContext) {
		url := start(ctx, admin.Check{Name: "postgresql", Func: healthy}, admin.Check{Name: "sink", Func: healthy})
		ready := get(ctx, http.MethodGet, url+"/readyz")
		Expect(ready.status).To(Equal(http.StatusOK))
		Expect(ready.body).To(MatchJSON(`{"status": "ok", "checks": {"postgresql": {"status": "ok"}, "sink": {"status": "ok"}}}`))
	})

	It("is not ready if a check fails, and names the check and the reason", func(ctx SpecContext) {
		url := start(ctx, admin.Check{Name: "postgresql", Func: failing}, admin.Check{Name: "sink", Func: healthy},
			admin.Check{Name: "schema", Func: func(context.Context) error { return errors.New("too old") }})
		ready := get(ctx, http.MethodGet, url+"/readyz")
		Expect(ready.status).To(Equal(http.StatusServiceUnavailable))
		Expect(ready.contentType).To(Equal("application/json"))
		Expect(ready.body).To(MatchJSON(`{"status": "failing", "checks": {
			"postgresql": {"status": "failing", "error": "connection refused"}, "sink": {"status": "ok"},
			"schema": {"status": "failing", "error": "too old"}}}`))
	})

	It("serves the page on all other paths", func(ctx SpecContext) {
		server := admin.New(admin.Options{
			Addr: "127.0.0.1:0", Log: slog.New(slog.NewTextHandler(log, nil)), Registry: registry,
			Page: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "page of "+r.URL.Path) }),
		})
		running, stop := context.WithCancel(context.WithoutCancel(ctx))
		ended := make(chan error, 1)
		go func() { ended <- server.Run(running) }()
		DeferCleanup(func() {
			http.DefaultClient.CloseIdleConnections()
			stop()
			Eventually(ended).Should(Receive(BeNil()))
		})
		Eventually(server.Addr).ShouldNot(BeEmpty())
		url := "http://" + server.Addr()
		Expect(get(ctx, http.MethodGet, url+"/").body).To(Equal("page of /"))
		Expect(get(ctx, http.MethodPost, url+"/pause").body).To(Equal("page of /pause"))
		Expect(get(ctx, http.MethodGet, url+"/livez").body).To(ContainSubstring("ok"))
		Expect(get(ctx, http.MethodGet, url+"/metrics").body).To(ContainSubstring("diehard_build_info"))
	})

	It("is ready again when the check passes again", func(ctx SpecContext) {
		var down atomic.Bool
		down.Store(true)
		url := start(ctx, admin.Check{Name: "postgresql", Func: func(ctx context.Context) error {
			if down.Load() {
				return failing(ctx)
			}
			return nil
		}})
		Expect(get(ctx, http.MethodGet, url+"/readyz").status).To(Equal(http.StatusServiceUnavailable))
		down.Store(false)
		Expect(get(ctx, http.MethodGet, url+"/readyz").status).To(Equal(http.StatusOK))
	})

	It("does not wait for a check that hangs, and does not start it again", func(ctx SpecContext) {
		var calls atomic.Int32
		release := make(chan struct{})
		url := start(ctx, admin.Check{Name: "postgresql", Func: func(context.Context) error {
			calls.Add(1)
			<-release
			return nil
		}})
		const probes = 8
		responses := make(chan response, probes+1)
		probe := func() {
			defer GinkgoRecover()
			responses <- get(ctx, http.MethodGet, url+"/readyz")
		}
		for range probes {
			go probe()
		}
		expectTimeout := func() {
			GinkgoHelper()
			var ready response
			Eventually(responses).Should(Receive(&ready))
			Expect(ready.status).To(Equal(http.StatusServiceUnavailable))
			Expect(ready.body).To(ContainSubstring("no result within"))
		}
		for range probes {
			expectTimeout()
		}
		probe() // after the other probes have timed out
		expectTimeout()
		Expect(calls.Load()).To(Equal(int32(1)))
		close(release)
		Eventually(func() int { return get(ctx, http.MethodGet, url+"/readyz").status }).Should(Equal(http.StatusOK))
	})

	It("gives each check a deadline", func(ctx SpecContext) {
		ended := make(chan error, 1)
		url := start(ctx, admin.Check{Name: "postgresql", Func: func(ctx context.Context) error {
			<-ctx.Done()
			ended <- context.Cause(ctx)
			return errors.New("canceling statement due to user request")
		}})
		ready := get(ctx, http.MethodGet, url+"/readyz")
		Expect(ready.status).To(Equal(http.StatusServiceUnavailable))
		Expect(ready.body).To(ContainSubstring("no result within"))
		Eventually(ended).Should(Receive(MatchError(ContainSubstring("no result within"))))
	})

	It("reports the error of a check that had a shorter deadline of its own", func(ctx SpecContext) {
		url := start(ctx, admin.Check{Name: "postgresql", Func: func(context.Context) error {
			return fmt.Errorf("connect: %w", context.DeadlineExceeded)
		}})
		Expect(get(ctx, http.MethodGet, url+"/readyz").body).To(ContainSubstring(`"error":"connect: context deadline exceeded"`))
	})

	It("serves the metrics of the program, the process and the build", func(ctx SpecContext) {
		gauge := prometheus.NewGauge(prometheus.GaugeOpts{Name: "diehard_test", Help: "A test."})
		gauge.Set(42)
		registry.MustRegister(gauge)
		shown := get(ctx, http.MethodGet, start(ctx)+"/metrics")
		Expect(shown.status).To(Equal(http.StatusOK))
		Expect(shown.contentType).To(HavePrefix("text/plain"))
		for _, line := range []string{
			"diehard_test 42\n", "diehard_build_info{version=\"1.2.3\"} 1\n", "\ngo_goroutines ", "\nprocess_start_time_seconds ",
			"\npromhttp_metric_handler_requests_in_flight 1\n",
		} {
			Expect(shown.body).To(ContainSubstring(line))
		}
	})

	It("serves the other metrics if a collector fails", func(ctx SpecContext) {
		registry.MustRegister(broken{})
		url := start(ctx)
		for range 2 { // the failure is counted after the scrape
			shown := get(ctx, http.MethodGet, url+"/metrics")
			Expect(shown.status).To(Equal(http.StatusOK))
			Expect(shown.body).To(ContainSubstring("diehard_build_info"))
			Expect(shown.body).NotTo(ContainSubstring("diehard_broken"))
		}
		Expect(get(ctx, http.MethodGet, url+"/metrics").body).
			To(ContainSubstring("promhttp_metric_handler_errors_total{cause=\"gathering\"} 2\n"))
		Expect(log).To(gbytes.Say(`level=WARN msg=.*diehard_broken`))
	})

	DescribeTable("serves nothing else", func(ctx SpecContext, method, path string, status int) {
		Expect(get(ctx, method, start(ctx)+path).status).To(Equal(status))
	},
		Entry(nil, http.MethodGet, "/", http.StatusNotFound),
		Entry(nil, http.MethodGet, "/debug/pprof/", http.StatusNotFound),
		Entry(nil, http.MethodPost, "/readyz", http.StatusMethodNotAllowed),
	)

	It("fails if the address is in use", func(ctx SpecContext) {
		taken, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(taken.Close)
		Expect(newServer(taken.Addr().String()).Run(ctx)).To(MatchError(ContainSubstring("address already in use")))
	})

	It("returns nil if it is stopped before it listens", func(ctx SpecContext) {
		stopped, stop := context.WithCancel(ctx)
		stop()
		Expect(newServer("localhost:0").Run(stopped)).To(Succeed())
	})

	It("finishes a request in flight when it is stopped", func(ctx SpecContext) {
		asked, release := make(chan struct{}), make(chan struct{})
		server := newServer("127.0.0.1:0", admin.Check{Name: "slow", Func: func(context.Context) error {
			close(asked)
			<-release
			return nil
		}})
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
		Eventually(func() error { // until the server accepts no more connections
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", server.Addr())
			if err == nil {
				_ = conn.Close()
			}
			return err
		}).Should(MatchError(syscall.ECONNREFUSED))
		close(release)
		Eventually(statuses).Should(Receive(Equal(http.StatusOK)))
		Eventually(ended).Should(Receive(BeNil()))
	})
})

// broken is a collector that always fails.
type broken struct{}

func (broken) Describe(descs chan<- *prometheus.Desc) { descs <- brokenDesc }

func (broken) Collect(samples chan<- prometheus.Metric) {
	samples <- prometheus.NewInvalidMetric(brokenDesc, errors.New("broken"))
}

var brokenDesc = prometheus.NewDesc("diehard_broken", "Fails.", nil, nil)
