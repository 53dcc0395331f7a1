package httpapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/labstack/echo/v4"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/users"
)

// domainProblems maps the errors of the use cases. The first match holds.
var domainProblems = []struct {
	matches func(error) bool
	kind    *problem.Kind
}{
	{is(users.ErrEmailTaken), problem.EmailTaken},
	{is(users.ErrNotFound), problem.UserNotFound},
	{is(idempotency.ErrInProgress), problem.IdempotencyKeyInUse},
	{is(idempotency.ErrMismatch), problem.IdempotencyKeyReused},
	{is(postgres.ErrOutcomeUnknown), problem.OutcomeUnknown}, // before what it was lost by
	{is(errRequestTimeout), problem.Timeout},
	{is(context.Canceled), problem.ClientGone}, // or cut off while the server stops
	{postgres.IsUnavailable, problem.Unavailable},
}

func is(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

// routerProblems maps Echo's own errors by their status.
var routerProblems = map[int]*problem.Kind{
	http.StatusNotFound:         problem.NotFound,
	http.StatusMethodNotAllowed: problem.MethodNotAllowed,
}

// answerError answers with the error's problem. A fault of the server is
// logged, once, with its cause, which the client does not see.
func (s *Server) answerError(err error, c echo.Context) {
	ctx := c.Request().Context()
	if c.Response().Committed {
		s.logFault(c, "request failed after its answer began", err)
		return
	}
	p := problemOf(ctx, err)
	if p.Kind.Status >= http.StatusInternalServerError {
		s.logFault(c, "request failed", err)
	}
	r := requestOf(c)
	r.problem = p.Kind.Slug
	if p.Kind.RetryAfter > 0 {
		c.Response().Header().Set(echo.HeaderRetryAfter, strconv.Itoa(p.Kind.RetryAfter))
	}
	if p.Kind == problem.ClientGone {
		_ = c.NoContent(p.Kind.Status)
		return
	}
	if err := writeJSON(c, p.Kind.Status, problem.ContentType, p.Details(r.id)); err != nil {
		s.logFault(c, "problem could not be sent", err)
	}
}

// problemOf returns the problem that an error is answered with. What it does
// not know is an internal error.
func problemOf(ctx context.Context, err error) *problem.Error {
	if _, ok := errors.AsType[*panicError](err); ok {
		return &problem.Error{Kind: problem.InternalError}
	}
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return p
	}
	if e, ok := errors.AsType[*echo.HTTPError](err); ok {
		if kind, ok := routerProblems[e.Code]; ok {
			return &problem.Error{Kind: kind}
		}
	}
	// A driver does not always say that it was the deadline that stopped it.
	if cause := context.Cause(ctx); cause != nil {
		err = errors.Join(err, cause)
	}
	for _, mapping := range domainProblems {
		if mapping.matches(err) {
			return &problem.Error{Kind: mapping.kind}
		}
	}
	return &problem.Error{Kind: problem.InternalError}
}

// isOutage reports whether a request with the error is answered as one that the
// database did not serve.
func isOutage(ctx context.Context, err error) bool {
	return problemOf(ctx, err).Kind.Status >= http.StatusServiceUnavailable
}

// logFault logs an error that is the server's own. An ERROR record with ctx is
// also what is reported to Sentry.
func (s *Server) logFault(c echo.Context, message string, err error) {
	attrs := []slog.Attr{
		slog.Any("err", err),
		slog.String("method", methodOf(c)),
		slog.String("route", routeOf(c)),
		slog.String("request_id", requestOf(c).id),
	}
	if panicked, ok := errors.AsType[*panicError](err); ok {
		attrs = append(attrs, slog.String("stack", panicked.stack()))
	}
	s.log.LogAttrs(c.Request().Context(), slog.LevelError, message, attrs...) //nolint:sloglint // a constant of each caller
}

// writeJSON answers with the value. Nothing is sent where it cannot be encoded.
func writeJSON(c echo.Context, status int, contentType string, value any) error {
	body, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	return writeBody(c, status, contentType, body)
}

func writeBody(c echo.Context, status int, contentType string, body []byte) error {
	c.Response().Header().Set(echo.HeaderContentLength, strconv.Itoa(len(body)))
	return c.Blob(status, contentType, body) //nolint:wrapcheck // the client has gone: echo's own
}
