// Package admin serves the operators' port of both programs: liveness, readiness and
// metrics. The port is separate from the API's, so that it is not exposed to clients
// and stays responsive under load.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/singleflight"

	"github.com/diehard-outbox/diehard/pkg/httpserver"
)

const (
	// checkTimeout limits a readiness check. Kubernetes waits only one second by
	// default, and counts a missing response as not ready, too.
	checkTimeout = 2 * time.Second
	// requestTimeout limits a request, including a slow scrape.
	requestTimeout = 30 * time.Second
	// shutdownTimeout limits how long Run waits for requests in flight.
	shutdownTimeout = 2 * time.Second

	readHeaderTimeout = 5 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 16 << 10
)

// Check is a readiness check.
type Check struct {
	// Name identifies the check in the response of /readyz.
	Name string
	// Func returns nil if the program is healthy, otherwise the reason. One goroutine
	// at a time calls it, with a deadline. At the deadline the check fails, even if
	// Func has not returned.
	Func func(ctx context.Context) error
}

// Options configures a Server. Log and Registry are required.
type Options struct {
	// Addr is the host:port to listen on. Port 0 picks a free port.
	Addr string
	Log  *slog.Logger
	// Registry holds the metrics of /metrics. New adds the metrics of the process,
	// the Go runtime and the build.
	Registry *prometheus.Registry
	// Version is the version of the build.
	Version string
	// Ready holds the checks of /readyz.
	Ready []Check
	// Page serves all other paths, or is nil.
	Page http.Handler
}

// Server serves /livez, /readyz, /metrics and the page, if there is one.
type Server struct {
	o      Options
	checks singleflight.Group
	http   *httpserver.Server
}

// New returns a Server that is not listening yet.
func New(o Options) *Server {
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "diehard_build_info",
		Help:        "Constant 1, labeled with the version of the program.",
		ConstLabels: prometheus.Labels{"version": o.Version},
	})
	build.Set(1)
	o.Registry.MustRegister(build, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	s := &Server{o: o}
	s.http = httpserver.New(httpserver.Options{
		Name: "admin port",
		Log:  o.Log,
		HTTP: &http.Server{
			Addr:              o.Addr,
			Handler:           s.routes(),
			MaxHeaderBytes:    maxHeaderBytes,
			ReadHeaderTimeout: readHeaderTimeout,
			ReadTimeout:       requestTimeout,
			WriteTimeout:      requestTimeout,
			IdleTimeout:       idleTimeout,
		},
		ShutdownTimeout: shutdownTimeout,
	})
	return s
}

// Addr returns the host:port that the server listens on, or an empty string
// before Run listens.
func (s *Server) Addr() string { return s.http.Addr() }

// Run listens and serves until ctx is canceled, and then returns nil. Run must be
// called only once.
func (s *Server) Run(ctx context.Context) error {
	err := s.http.Run(ctx)
	if errors.Is(err, httpserver.ErrCutOff) {
		return nil // clients repeat probes and scrapes
	}
	return err
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) {
		s.respond(w, r, http.StatusOK, health{Status: statusOK})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ready := s.ready(r.Context())
		code := http.StatusOK
		if ready.Status != statusOK {
			code = http.StatusServiceUnavailable
		}
		s.respond(w, r, code, ready)
	})
	mux.Handle("GET /metrics", promhttp.InstrumentMetricHandler(s.o.Registry,
		promhttp.HandlerFor(s.o.Registry, promhttp.HandlerOpts{
			ErrorLog: slog.NewLogLogger(s.o.Log.Handler(), slog.LevelWarn),
			// One failing collector must not hide the metrics of the others.
			ErrorHandling: promhttp.ContinueOnError,
			Registry:      s.o.Registry,
		})))
	if s.o.Page != nil {
		mux.Handle("/", s.o.Page)
	}
	return mux
}

const (
	statusOK      = "ok"
	statusFailing = "failing"
)

// health is the response of /livez and /readyz.
type health struct {
	Status string                 `json:"status"`
	Checks map[string]checkResult `json:"checks,omitempty"`
}

type checkResult struct {
	Status string `json:"status"`
	Error  string `json:"error,omitempty"`
}

// ready runs all checks concurrently.
func (s *Server) ready(ctx context.Context) health {
	result := health{Status: statusOK, Checks: make(map[string]checkResult, len(s.o.Ready))}
	var (
		mu    sync.Mutex
		group sync.WaitGroup
	)
	for _, check := range s.o.Ready {
		group.Go(func() {
			err := s.run(ctx, check)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				result.Checks[check.Name] = checkResult{Status: statusOK}
				return
			}
			result.Status = statusFailing
			result.Checks[check.Name] = checkResult{Status: statusFailing, Error: err.Error()}
		})
	}
	group.Wait()
	return result
}

var errCheckTimeout = errors.New("no result within " + checkTimeout.String())

// run runs the check. If another call of the check is running, run waits for its
// result. Therefore probes do not pile up behind a check that hangs.
func (s *Server) run(ctx context.Context, check Check) error {
	running := s.checks.DoChan(check.Name, func() (any, error) {
		ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), checkTimeout, errCheckTimeout)
		defer cancel()
		err := check.Func(ctx)
		if err != nil && ctx.Err() != nil {
			err = errCheckTimeout // replaces the error that the deadline caused
		}
		return nil, err
	})
	timeout := time.NewTimer(checkTimeout)
	defer timeout.Stop()
	select {
	case result := <-running:
		return result.Err
	case <-timeout.C:
		return errCheckTimeout
	}
}

func (s *Server) respond(w http.ResponseWriter, r *http.Request, code int, body health) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(body); err != nil {
		s.o.Log.DebugContext(r.Context(), "probe disconnected before the response", "err", err)
	}
}
