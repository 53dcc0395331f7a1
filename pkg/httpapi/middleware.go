package httpapi

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/getsentry/sentry-go"
	"github.com/google/uuid"
	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/diehard-outbox/diehard/pkg/httpapi/admission"
	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// request has the metadata of a request.
type request struct {
	// id identifies the request in the response, in logs and in problems.
	id string
	// traceparent is the trace that the request's events join. It may be zero.
	traceparent outbox.Traceparent
	// problem is the slug of the problem in the response, or empty.
	problem string
}

const requestKey = "diehard.request"

// requestOf returns the metadata that identify has stored.
func requestOf(c echo.Context) *request {
	r, ok := c.Get(requestKey).(*request)
	if !ok { // unreachable: identify runs first
		return &request{}
	}
	return r
}

// identify sets the request's id and trace context, and the headers of every response.
func (s *Server) identify(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		r := &request{
			id:          requestID(c.Request().Header.Get(echo.HeaderXRequestID)),
			traceparent: traceparentOf(c.Request().Header),
		}
		c.Set(requestKey, r)
		header := c.Response().Header()
		header.Set(echo.HeaderXRequestID, r.id)
		header.Set(echo.HeaderXContentTypeOptions, "nosniff")
		header.Set(echo.HeaderCacheControl, "no-store") // responses hold personal data
		setTraceparent(c, r.traceparent)
		return next(c)
	}
}

// traceparentOf returns the header's traceparent. It is zero when the header is
// missing, invalid or given more than once.
func traceparentOf(header http.Header) outbox.Traceparent {
	values := header.Values(sentry.TraceparentHeader)
	if len(values) != 1 {
		return outbox.Traceparent{}
	}
	parsed, err := outbox.ParseTraceparent(values[0])
	if err != nil {
		return outbox.Traceparent{} // the standard tells servers to ignore an invalid header
	}
	return parsed
}

// setTraceparent sets the traceparent of the response, unless t is zero.
func setTraceparent(c echo.Context, t outbox.Traceparent) {
	if !t.IsZero() {
		c.Response().Header().Set(sentry.TraceparentHeader, t.String())
	}
}

// requestIDPattern allows short ids whose characters need no quoting in logs and
// shells.
var requestIDPattern = regexp.MustCompile(`^[A-Za-z0-9._:/+=-]{1,128}$`)

// requestID returns the client's id if it matches the pattern, otherwise a new id.
func requestID(given string) string {
	if requestIDPattern.MatchString(given) {
		return given
	}
	id, err := uuid.NewV7()
	if err != nil { // crypto/rand does not fail since Go 1.24
		return ""
	}
	return id.String()
}

// Labels of unknown routes and methods. Clients must not be able to create time
// series.
const (
	unmatchedRoute = "unmatched"
	otherMethod    = "other"
)

func routeOf(c echo.Context) string {
	if path := c.Path(); path != "" {
		return path
	}
	return unmatchedRoute
}

func methodOf(c echo.Context) string {
	switch method := c.Request().Method; method {
	case http.MethodConnect, http.MethodDelete, http.MethodGet, http.MethodHead, http.MethodOptions,
		http.MethodPatch, http.MethodPost, http.MethodPut, http.MethodTrace:
		return method
	default:
		return otherMethod
	}
}

func newRequestHistogram(registerer prometheus.Registerer) *prometheus.HistogramVec {
	return promauto.With(registerer).NewHistogramVec(prometheus.HistogramOpts{
		Name:    "diehard_http_request_seconds",
		Help:    "Time from a request's headers to the end of its response.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
	}, []string{"route", "method", "status"})
}

func registerBodyGauge(registerer prometheus.Registerer, bodies *input.Budget) {
	promauto.With(registerer).NewGaugeFunc(prometheus.GaugeOpts{
		Name: "diehard_http_body_bytes",
		Help: "Bytes that are reserved for the request bodies in memory. The limit is http.body_budget.",
	}, func() float64 { return float64(bodies.Held()) })
}

func registerWaitingGauge(registerer prometheus.Registerer, shedder *admission.Shedder) {
	promauto.With(registerer).NewGaugeFunc(prometheus.GaugeOpts{
		Name: "diehard_http_waiting_requests",
		Help: "Requests that wait because http.max_concurrent_requests requests use the database.",
	}, func() float64 { return float64(shedder.Waiting()) })
}

// observe measures the request and logs it. It does not record the path or the
// query: they can contain e-mail addresses.
func (s *Server) observe(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		start := time.Now()
		err := next(c)
		duration, status := time.Since(start), c.Response().Status
		route, method, r := routeOf(c), methodOf(c), requestOf(c)
		s.requests.WithLabelValues(route, method, strconv.Itoa(status)).Observe(duration.Seconds())

		attrs := []slog.Attr{
			slog.String("method", method),
			slog.String("route", route),
			slog.Int("status", status),
			slog.Duration("duration", duration),
			slog.String("request_id", r.id),
		}
		if key := admission.KeyOf(c); key != nil {
			attrs = append(attrs, slog.String("client", key.Client), slog.String("key", key.Name))
		}
		if !s.options.AddressesOff {
			attrs = append(attrs, slog.String("client_address", c.RealIP()))
		}
		if r.problem != "" {
			attrs = append(attrs, slog.String("problem", r.problem))
		}
		if !r.traceparent.IsZero() {
			attrs = append(attrs, slog.String("trace_id", r.traceparent.TraceID()))
		}
		s.log.LogAttrs(c.Request().Context(), slog.LevelInfo, "request", attrs...)
		return err
	}
}

// trace runs the request in a span if Options.Tracer is set: see traceInSpan. Otherwise it
// runs the request in a Sentry transaction if Sentry is enabled. The request's events then
// join that transaction. If Sentry is disabled, the events get the client's trace context
// unchanged. The transaction continues the client's trace. It ignores the client's
// sampling decision, because samples cost the operator money.
//
// The transaction has only the attributes that trace sets. The request's path,
// query, headers and body contain personal data and keys.
func (s *Server) trace(next echo.HandlerFunc) echo.HandlerFunc {
	if s.options.Tracer != nil {
		return s.traceInSpan(next)
	}
	return func(c echo.Context) error {
		if !sentry.CurrentHub().Client().IsEnabled() {
			return next(c)
		}
		hub, r := hubOf(c), requestOf(c)
		ctx := sentry.SetHubOnContext(c.Request().Context(), hub)
		transaction := sentry.StartTransaction(ctx, methodOf(c)+" "+routeOf(c),
			sentry.ContinueTrace(hub, sentryTrace(r.traceparent), ""),
			sentry.WithOpName("http.server"),
			sentry.WithTransactionSource(sentry.SourceRoute),
		)
		if joined, err := outbox.ParseTraceparent(transaction.ToTraceparent()); err == nil {
			r.traceparent = joined
		}
		setTraceparent(c, r.traceparent)
		c.SetRequest(c.Request().WithContext(transaction.Context()))

		err := next(c)

		status := c.Response().Status
		transaction.Status = sentry.HTTPtoSpanStatus(status)
		transaction.SetData("http.request.method", methodOf(c))
		transaction.SetData("http.response.status_code", status)
		transaction.Finish()
		return err
	}
}

// hubOf returns a Sentry hub whose reports have the tags of the request.
func hubOf(c echo.Context) *sentry.Hub {
	hub := sentry.CurrentHub().Clone()
	hub.Scope().SetTag("request_id", requestOf(c).id)
	hub.Scope().SetTag("route", methodOf(c)+" "+routeOf(c))
	return hub
}

// sentryTrace returns the traceparent in the format of Sentry's own header,
// without a sampling decision.
func sentryTrace(t outbox.Traceparent) string {
	if t.IsZero() {
		return ""
	}
	return t.TraceID() + "-" + t.ParentID()
}

// underV1 reports whether the path is below /v1. Requests below /v1 need a key
// and count against the rate limits, even if the route does not exist.
func underV1(c echo.Context) bool {
	for _, path := range []string{c.Request().URL.Path, c.Path()} {
		if path == "/v1" || strings.HasPrefix(path, "/v1/") {
			return true
		}
	}
	return false
}

var escape = regexp.MustCompile(`%[0-9A-Fa-f]{2}`)

// decodePath decodes the unreserved characters of the path, which mean the same with and
// without an escape sequence (RFC 3986, section 6.2.2.2). The router compares the text.
func decodePath(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if u := c.Request().URL; u.RawPath != "" {
			u.RawPath = escape.ReplaceAllStringFunc(u.RawPath, func(sequence string) string {
				decoded, err := hex.DecodeString(sequence[1:])
				if err != nil || !isUnreserved(decoded[0]) {
					return sequence
				}
				return string(decoded)
			})
			if !strings.Contains(u.RawPath, "%") {
				u.RawPath = ""
			}
		}
		return next(c)
	}
}

func isUnreserved(b byte) bool {
	return 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || strings.IndexByte("-._~", b) >= 0
}

// onlyLoopback refuses requests whose Host is not a name of this machine. Otherwise, the
// page of another site could reach an API without authentication: the site lets its name
// resolve to 127.0.0.1 (DNS rebinding).
func onlyLoopback(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if !isLoopback(c.Request().Host) {
			return &problem.Error{Kind: problem.MisdirectedRequest}
		}
		return next(c)
	}
}

// isLoopback reports whether the host, with or without a port, is localhost or a loopback
// address.
func isLoopback(host string) bool {
	name := strings.Trim(host, "[]")
	if h, _, err := net.SplitHostPort(host); err == nil {
		name = h
	}
	address, err := netip.ParseAddr(name)
	return strings.EqualFold(name, "localhost") || err == nil && address.IsLoopback()
}

// withoutQuery refuses query parameters. It is for routes that have no parameters.
func withoutQuery(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if c.Request().URL.RawQuery != "" {
			query, err := input.ReadQuery(c.Request())
			if err != nil {
				return err
			}
			if err := query.Check(nil); err != nil {
				return err
			}
		}
		return next(c)
	}
}

// limitBodies makes the request's body count against the budget of all bodies, until the
// request has ended.
func (s *Server) limitBodies(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		body := s.bodies.Body(c.Request().Body, c.Request().ContentLength)
		defer body.Release()
		c.Request().Body = body
		return next(c)
	}
}

// errRequestTimeout is the cause of a request's context after its deadline.
var errRequestTimeout = errors.New("the request took too long")

// limitTime sets the request's deadline. It responds to errors before it cancels the
// context, because the response depends on the cause of the context.
func (s *Server) limitTime(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		ctx, cancel := context.WithTimeoutCause(c.Request().Context(), s.options.RequestTimeout, errRequestTimeout)
		defer cancel()
		c.SetRequest(c.Request().WithContext(ctx))
		if err := next(c); err != nil {
			c.Error(err)
		}
		return nil
	}
}

// recoverPanics turns a panic into an error. The request fails, and the process
// continues.
func (s *Server) recoverPanics(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) (err error) {
		defer func() {
			if value := recover(); value != nil {
				err = newPanicError(value)
			}
		}()
		return next(c)
	}
}

// panicError is a panic of a handler. It does not unwrap to the panic's value: a
// panic is a bug, even if its value is an error that the API knows.
type panicError struct {
	value any
	pcs   []uintptr
}

const maxStackFrames = 64

func newPanicError(value any) *panicError {
	pcs := make([]uintptr, maxStackFrames)
	// Skip Callers, this function and the deferred function.
	return &panicError{value: value, pcs: pcs[:runtime.Callers(3, pcs)]}
}

// Error implements error.
func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// StackTrace returns the program counters of the stack. Sentry calls it.
func (e *panicError) StackTrace() []uintptr { return e.pcs }

// stack returns the stack as text, one frame per line.
func (e *panicError) stack() string {
	var b strings.Builder
	frames := runtime.CallersFrames(e.pcs)
	for {
		frame, more := frames.Next()
		fmt.Fprintf(&b, "%s %s:%d\n", frame.Function, frame.File, frame.Line)
		if !more {
			return b.String()
		}
	}
}
