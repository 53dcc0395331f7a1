package httpapi

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

// database calls work under the shedder's limit. It logs an outage of the database once:
// an error at the begin, and the number of failed requests at the end.
func (s *Server) database(ctx context.Context, work func() error) error {
	err := s.shedder.Do(ctx, work)
	switch {
	case err == nil:
		s.outage.ended(ctx)
	case problemKind(err) != nil, errors.Is(err, context.Canceled): // says nothing about the database
	case isOutage(ctx, err):
		s.outage.failed(ctx, err)
	default: // the database has refused the request
		s.outage.ended(ctx)
	}
	return err
}

// outage is the current outage of the database, if there is one.
type outage struct {
	log *slog.Logger

	mu       sync.Mutex
	since    time.Time // zero without an outage
	requests int
}

func (o *outage) failed(ctx context.Context, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.requests++
	if o.since.IsZero() {
		o.since = time.Now()
		o.log.ErrorContext(ctx, "database unavailable", "err", err)
	}
}

func (o *outage) ended(ctx context.Context) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.since.IsZero() {
		o.log.InfoContext(ctx, "database available again", "duration", time.Since(o.since), "failed_requests", o.requests)
		o.since, o.requests = time.Time{}, 0
	}
}

// refuseIfFull is a middleware that refuses events while the outbox is full. It refuses
// changes of users only if the operator wants that.
func (s *Server) refuseIfFull(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		method, path := c.Request().Method, c.Path()
		isRead := method == http.MethodGet || method == http.MethodHead
		isEvent := strings.HasPrefix(path, "/v1/events")
		if isRead || !isEvent && !s.options.FullRefusesChanges || !strings.HasPrefix(path, "/v1/") || !s.options.Full() {
			return next(c)
		}
		return &problem.Error{Kind: problem.OutboxFull}
	}
}

// shedInterval is the least time between two log records about requests that were shed.
const shedInterval = 10 * time.Second

// shedding counts the requests that were shed.
type shedding struct {
	log    *slog.Logger
	metric *prometheus.CounterVec

	mu       sync.Mutex
	logged   time.Time
	requests int // since the last log record
}

func newShedding(registerer prometheus.Registerer, log *slog.Logger) *shedding {
	metric := promauto.With(registerer).NewCounterVec(prometheus.CounterOpts{
		Name: "diehard_http_shed_requests_total",
		Help: "Requests that were refused to protect other requests, by the problem in the response.",
	}, []string{"problem"})
	for _, kind := range []*problem.Kind{problem.Overloaded, problem.Unavailable, problem.Locked, problem.OutboxFull} {
		metric.WithLabelValues(kind.Slug)
	}
	return &shedding{log: log, metric: metric}
}

// count counts a request that was shed, and logs a record from time to time.
func (s *shedding) count(ctx context.Context, kind *problem.Kind) {
	s.metric.WithLabelValues(kind.Slug).Inc()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests++
	if time.Since(s.logged) >= shedInterval {
		s.log.WarnContext(ctx, "shedding requests", "problem", kind.Slug, "requests", s.requests)
		s.logged, s.requests = time.Now(), 0
	}
}
