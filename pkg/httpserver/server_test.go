package httpserver_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/pkg/httpserver"
)

func TestHTTPServer(t *testing.T) {
	RegisterFailHandler(Fail)
	EnforceDefaultTimeoutsWhenUsingContexts()
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "httpserver")
}

var _ = Describe("A server", func() {
	var (
		log     *gbytes.Buffer
		arrived chan context.Context // of each request
		release chan struct{}        // lets each request finish
		server  *httpserver.Server
		ended   chan error // receives the result of Run
		stop    context.CancelFunc
	)

	newServer := func(addr string, shutdownTimeout time.Duration) *httpserver.Server {
		arrived, release := arrived, release
		return httpserver.New(httpserver.Options{
			Name: "test server", Log: slog.New(slog.NewTextHandler(io.MultiWriter(log, GinkgoWriter), nil)),
			HTTP: &http.Server{Addr: addr, ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				arrived <- r.Context()
				select {
				case <-release:
					w.WriteHeader(http.StatusNoContent)
				case <-r.Context().Done():
				}
			})},
			ShutdownTimeout: shutdownTimeout,
		})
	}

	start := func(ctx context.Context, shutdownTimeout time.Duration) {
		GinkgoHelper()
		server, ended = newServer("127.0.0.1:0", shutdownTimeout), make(chan error, 1)
		Expect(server.Addr()).To(BeEmpty())
		var running context.Context
		running, stop = context.WithCancel(context.WithoutCancel(ctx))
		server, ended := server, ended
		go func() { ended <- server.Run(running) }()
		DeferCleanup(stop)
		Eventually(ctx, server.Addr).ShouldNot(BeEmpty())
	}

	// ask sends a request. The first channel receives the status of the response, the
	// second one the error.
	ask := func(ctx context.Context) (<-chan int, <-chan error) {
		GinkgoHelper()
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+server.Addr(), http.NoBody)
		Expect(err).NotTo(HaveOccurred())
		statuses, failures := make(chan int, 1), make(chan error, 1)
		go func() {
			response, err := http.DefaultClient.Do(request)
			if err != nil {
				failures <- err
				return
			}
			_ = response.Body.Close()
			statuses <- response.StatusCode
		}()
		return statuses, failures
	}

	dial := func(ctx context.Context) error {
		connection, err := new(net.Dialer).DialContext(ctx, "tcp", server.Addr())
		if err == nil {
			_ = connection.Close()
		}
		return err
	}

	BeforeEach(func() {
		log, arrived, release = gbytes.NewBuffer(), make(chan context.Context, 1), make(chan struct{})
	})

	It("logs its listen address", func(ctx SpecContext) {
		start(ctx, time.Minute)
		Expect(log).To(gbytes.Say(`level=INFO msg="test server listens" addr=` + server.Addr()))
	})

	It("returns an error if the address is in use", func(ctx SpecContext) {
		start(ctx, time.Minute)
		Expect(newServer(server.Addr(), time.Minute).Run(ctx)).To(MatchError(SatisfyAll(
			HavePrefix("start the test server: "), HaveSuffix("address already in use"))))
	})

	It("returns nil if it is stopped before it listens", func(ctx SpecContext) {
		stopped, stop := context.WithCancel(ctx)
		stop()
		Expect(newServer("localhost:0", time.Minute).Run(stopped)).To(Succeed())
	})

	It("finishes a request in flight when it is stopped, and accepts no new connection", func(ctx SpecContext) {
		start(ctx, time.Minute)
		statuses, _ := ask(ctx)
		var request context.Context
		Eventually(ctx, arrived).Should(Receive(&request))
		stop()
		Eventually(ctx, dial).WithArguments(ctx).Should(MatchError(syscall.ECONNREFUSED))
		Expect(request.Err()).NotTo(HaveOccurred())
		Expect(ended).NotTo(Receive())

		close(release)
		Eventually(ctx, statuses).Should(Receive(Equal(http.StatusNoContent)))
		Eventually(ctx, ended).Should(Receive(BeNil()))
	})

	It("cuts off a request that does not finish within the shutdown timeout", func(ctx SpecContext) {
		start(ctx, time.Millisecond)
		_, failures := ask(ctx)
		var request context.Context
		Eventually(ctx, arrived).Should(Receive(&request))
		stop()
		Eventually(ctx, ended).Should(Receive(SatisfyAll(MatchError(httpserver.ErrCutOff), MatchError(context.DeadlineExceeded))))
		Eventually(ctx, request.Done()).Should(BeClosed())
		Eventually(ctx, failures).Should(Receive())
	})
})
