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

	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/users"
)

// typeBase and a problem's slug make its type. docs/errors.md has a section
// under each slug. A slug that was released is never changed or reused.
const typeBase = "https://github.com/diehard-outbox/diehard/blob/main/docs/errors.md#"

// problem is a kind of RFC 9457 problem.
type problem struct {
	slug   string
	status int
	title  string
	// detail is what is said where the error itself has nothing to say to a
	// client.
	detail string
	// retryAfter, in seconds, is when to try again; 0 says nothing.
	retryAfter int
}

var (
	malformedRequest = &problem{
		slug: "malformed-request", status: http.StatusBadRequest, title: "Malformed request",
		detail: "The request could not be read",
	}
	invalidJSON = &problem{
		slug: "invalid-json", status: http.StatusBadRequest, title: "Invalid JSON",
		detail: "The body is not valid JSON",
	}
	unauthorized = &problem{
		slug: "unauthorized", status: http.StatusUnauthorized, title: "Unauthorized",
		detail: "This needs an API key that the server knows, as Authorization: Bearer KEY",
	}
	rateLimited = &problem{
		slug: "rate-limited", status: http.StatusTooManyRequests, title: "Rate limited",
		detail: "Too many requests; the headers Retry-After and RateLimit say when to go on",
	}
	overloaded = &problem{
		slug: "overloaded", status: http.StatusServiceUnavailable, title: "Overloaded",
		detail: "More requests are being worked on than the server takes; nothing was changed", retryAfter: 1,
	}
	notFound = &problem{
		slug: "not-found", status: http.StatusNotFound, title: "Not found",
		detail: "There is nothing at this path",
	}
	userNotFound = &problem{
		slug: "user-not-found", status: http.StatusNotFound, title: "User not found",
		detail: "There is no user with this id",
	}
	methodNotAllowed = &problem{
		slug: "method-not-allowed", status: http.StatusMethodNotAllowed, title: "Method not allowed",
		detail: "This path does not have the method; the Allow header lists those that it has",
	}
	requestTimeout = &problem{
		slug: "request-timeout", status: http.StatusRequestTimeout, title: "Request timeout",
		detail: "The request's body took too long to arrive",
	}
	invalidIdempotencyKey = &problem{
		slug: "invalid-idempotency-key", status: http.StatusBadRequest, title: "Invalid idempotency key",
		detail: "The Idempotency-Key header must come once and have from 1 to 255 printable ASCII characters, in double quotes or without spaces",
	}
	idempotencyKeyInUse = &problem{
		slug: "idempotency-key-in-use", status: http.StatusConflict, title: "Idempotency key in use",
		detail: "A request with this idempotency key is being worked on; repeat this one to get its answer", retryAfter: 1,
	}
	idempotencyKeyReused = &problem{
		slug: "idempotency-key-reused", status: http.StatusUnprocessableEntity, title: "Idempotency key reused",
		detail: "This idempotency key was used for another request; take a new key for each change",
	}
	emailTaken = &problem{
		slug: "email-taken", status: http.StatusConflict, title: "E-mail address taken",
		detail: "User with this email already exists",
	}
	bodyTooLarge = &problem{
		slug: "body-too-large", status: http.StatusRequestEntityTooLarge, title: "Body too large",
		detail: "The request's body is larger than this API takes",
	}
	unsupportedMediaType = &problem{
		slug: "unsupported-media-type", status: http.StatusUnsupportedMediaType, title: "Unsupported media type",
		detail: "The body must be sent as Content-Type: application/json, in UTF-8 and without a Content-Encoding",
	}
	validationFailed = &problem{
		slug: "validation-failed", status: http.StatusUnprocessableEntity, title: "Validation failed",
		detail: "Values in the request break a rule; errors lists them",
	}
	// clientGone is not sent to anybody. It stands in the log and the metrics;
	// the status is nginx's.
	clientGone    = &problem{slug: "client-gone", status: 499}
	internalError = &problem{
		slug: "internal-error", status: http.StatusInternalServerError, title: "Internal error",
		detail: "Something went wrong on the server; its log has more under the request id",
	}
	unavailable = &problem{
		slug: "unavailable", status: http.StatusServiceUnavailable, title: "Temporarily unavailable",
		detail: "The database is not available; nothing was changed", retryAfter: 1,
	}
	outcomeUnknown = &problem{
		slug: "outcome-unknown", status: http.StatusServiceUnavailable, title: "Outcome unknown",
		detail: "The database was lost while the change was being committed: it was made in whole or not at all", retryAfter: 1,
	}
	timeout = &problem{
		slug: "timeout", status: http.StatusGatewayTimeout, title: "Timeout",
		detail: "The request took too long and was given up; nothing was changed", retryAfter: 1,
	}
)

// domainProblems maps the errors of the use cases. The first match holds.
var domainProblems = []struct {
	matches func(error) bool
	problem *problem
}{
	{is(users.ErrEmailTaken), emailTaken},
	{is(users.ErrNotFound), userNotFound},
	{is(idempotency.ErrInProgress), idempotencyKeyInUse},
	{is(idempotency.ErrMismatch), idempotencyKeyReused},
	{is(postgres.ErrOutcomeUnknown), outcomeUnknown}, // before what it was lost by
	{is(errRequestTimeout), timeout},
	{is(context.Canceled), clientGone}, // or cut off while the server stops
	{postgres.IsUnavailable, unavailable},
}

func is(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

// routerProblems maps Echo's own errors by their status.
var routerProblems = map[int]*problem{
	http.StatusNotFound:         notFound,
	http.StatusMethodNotAllowed: methodNotAllowed,
}

// problemError is an error that a handler has already made a problem of.
type problemError struct {
	problem *problem
	// detail replaces the problem's own; may be empty.
	detail string
	errors []valueError
}

// valueError is what is wrong with one value in the request.
type valueError struct {
	// Pointer is the value's place in the body, as a JSON pointer (RFC 6901).
	Pointer *string `json:"pointer,omitzero"`
	// Parameter is the value's name in the query.
	Parameter *string `json:"parameter,omitzero"`
	Detail    string  `json:"detail"`
}

// Error implements error.
func (e *problemError) Error() string { return e.problem.slug }

// description is the problem's detail.
func (e *problemError) description() string { return cmp.Or(e.detail, e.problem.detail) }

// problemDetails is a problem on the wire.
type problemDetails struct {
	Type      string       `json:"type"`
	Title     string       `json:"title"`
	Status    int          `json:"status"`
	Detail    string       `json:"detail"`
	RequestID string       `json:"request_id"`
	Errors    []valueError `json:"errors,omitempty"`
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
	if p.problem.status >= http.StatusInternalServerError {
		s.logFault(c, "request failed", err)
	}
	r := requestOf(c)
	r.problem = p.problem.slug
	details := problemDetails{
		Type:      typeBase + p.problem.slug,
		Title:     p.problem.title,
		Status:    p.problem.status,
		Detail:    p.description(),
		RequestID: r.id,
		Errors:    p.errors,
	}
	if p.problem.retryAfter > 0 {
		c.Response().Header().Set(echo.HeaderRetryAfter, strconv.Itoa(p.problem.retryAfter))
	}
	if p.problem == clientGone {
		_ = c.NoContent(p.problem.status)
		return
	}
	if err := writeJSON(c, p.problem.status, "application/problem+json", details); err != nil {
		s.logFault(c, "problem could not be sent", err)
	}
}

// problemOf returns the problem that an error is answered with. What it does
// not know is an internal error.
func problemOf(ctx context.Context, err error) *problemError {
	if _, ok := errors.AsType[*panicError](err); ok {
		return &problemError{problem: internalError}
	}
	if p, ok := errors.AsType[*problemError](err); ok {
		return p
	}
	if e, ok := errors.AsType[*echo.HTTPError](err); ok {
		if problem, ok := routerProblems[e.Code]; ok {
			return &problemError{problem: problem}
		}
	}
	// A driver does not always say that it was the deadline that stopped it.
	if cause := context.Cause(ctx); cause != nil {
		err = errors.Join(err, cause)
	}
	for _, mapping := range domainProblems {
		if mapping.matches(err) {
			return &problemError{problem: mapping.problem}
		}
	}
	return &problemError{problem: internalError}
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
