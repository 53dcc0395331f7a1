package httpapi

import (
	"cmp"
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

// domainProblems maps the errors of the use cases to problems. The first match
// wins.
var domainProblems = []struct {
	matches func(error) bool
	kind    *problem.Kind
}{
	{is(users.ErrEmailTaken), problem.EmailTaken},
	{is(users.ErrNotFound), problem.UserNotFound},
	{is(users.ErrModified), problem.PreconditionFailed},
	{is(idempotency.ErrInProgress), problem.IdempotencyKeyInUse},
	{is(idempotency.ErrMismatch), problem.IdempotencyKeyReused},
	{is(postgres.ErrOutcomeUnknown), problem.OutcomeUnknown}, // before IsUnavailable, which also matches a lost connection
	{is(errRequestTimeout), problem.Timeout},
	{is(context.Canceled), problem.ClientGone}, // the client disconnected, or a stopping server canceled the request
	{postgres.IsLockTimeout, problem.Locked},
	{postgres.IsConflict, problem.Locked},
	{postgres.IsAccessRefused, problem.Unavailable},
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

// sendProblem responds with the error's problem. It logs the cause of a server error,
// because the client does not see the cause. The methods of outage and shedding log the
// other errors.
func (s *Server) sendProblem(err error, c echo.Context) {
	ctx := c.Request().Context()
	if c.Response().Committed {
		s.logFault(c, "request failed after its response began", err)
		return
	}
	p := problemOf(ctx, err)
	switch {
	case p.Kind == problem.Overloaded, p.Kind == problem.Locked, p.Kind == problem.OutboxFull, p.Kind == problem.Unavailable && problemKind(err) != nil:
		s.shedding.count(ctx, p.Kind)
	case p.Kind.Status == http.StatusInternalServerError, p.Kind == problem.OutcomeUnknown:
		s.logFault(c, "request failed", err)
	}
	r := requestOf(c)
	r.problem = p.Kind.Slug
	if seconds := cmp.Or(p.RetryAfter, p.Kind.RetryAfter); seconds > 0 {
		c.Response().Header().Set(echo.HeaderRetryAfter, strconv.Itoa(seconds))
	}
	if p.Kind == problem.ClientGone {
		_ = c.NoContent(p.Kind.Status)
		return
	}
	if err := writeJSON(c, p.Kind.Status, problem.ContentType, p.Details(r.id)); err != nil {
		s.logFault(c, "sending problem failed", err)
	}
}

// problemOf returns the problem for an error. An unknown error is an internal
// error.
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
	// A driver's error does not always say that the deadline canceled the statement.
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

// isOutage reports whether the error means that the database is unavailable.
func isOutage(ctx context.Context, err error) bool {
	kind := problemOf(ctx, err).Kind
	return kind == problem.Unavailable || kind == problem.OutcomeUnknown || kind == problem.Timeout
}

// problemKind returns the kind of a *problem.Error, or nil.
func problemKind(err error) *problem.Kind {
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return p.Kind
	}
	return nil
}

// logFault logs a server error. Sentry reports ERROR records that have a context.
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
	s.log.LogAttrs(c.Request().Context(), slog.LevelError, message, attrs...) //nolint:sloglint // each caller passes a constant
}

// writeJSON sends the value as the response. If the value cannot be encoded, it sends
// nothing.
func writeJSON(c echo.Context, status int, contentType string, value any) error {
	body, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encode the response: %w", err)
	}
	return writeBody(c, status, contentType, body)
}

func writeBody(c echo.Context, status int, contentType string, body []byte) error {
	c.Response().Header().Set(echo.HeaderContentLength, strconv.Itoa(len(body)))
	return c.Blob(status, contentType, body) //nolint:wrapcheck // the error of echo when the client has disconnected
}
