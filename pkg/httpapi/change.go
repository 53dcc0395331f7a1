package httpapi

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"net/http"
	"regexp"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/jmoiron/sqlx"
	"github.com/labstack/echo/v4"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/groupcommit"
	"github.com/diehard-outbox/diehard/pkg/httpapi/admission"
	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

const (
	headerIdempotencyKey      = "Idempotency-Key"
	headerIdempotencyReplayed = "Idempotency-Replayed"
)

// withBody returns a handler that reads the request's body. If the request is invalid and
// has an idempotency key, it may be the repetition of a request that was valid earlier: the
// limits may have changed since, for example after an upgrade. It then gets the stored
// response.
func (s *Server) withBody(handler func(c echo.Context, body *input.Object) error) echo.HandlerFunc {
	return func(c echo.Context) error {
		body, err := input.ReadBody(c.Response().Writer, c.Request(), s.options.MaxBodyBytes)
		if err != nil {
			return err
		}
		object, err := input.ParseObject(c.Request().Context(), body)
		if err == nil {
			err = handler(c, object)
		}
		if p, ok := errors.AsType[*problem.Error](err); ok && (p.Kind == problem.InvalidJSON || p.Kind == problem.ValidationFailed) {
			return s.replayOr(c, body, err)
		}
		return err
	}
}

// replayOr responds with the stored response to the request, or returns the problem.
func (s *Server) replayOr(c echo.Context, body []byte, invalid error) error {
	key, given, err := idempotencyKey(c, body)
	if !given || err != nil {
		return invalid
	}
	var response idempotency.Response
	var found bool
	ctx := c.Request().Context()
	err = s.shedder.Do(ctx, func() (err error) {
		response, found, err = s.options.Idempotency.Find(ctx, key)
		return err
	})
	switch {
	case errors.Is(err, idempotency.ErrMismatch), err == nil && !found:
		return invalid
	case err != nil:
		return err
	}
	return respond(c, response, true)
}

// change runs work in a transaction, and responds after the commit. If the request has
// an idempotency key, the same transaction stores the response, and a repeated request
// gets the stored response. body is the request's body.
func (s *Server) change(c echo.Context, body []byte, work func(tx *sqlx.Tx) (idempotency.Response, error)) error {
	return s.changeInGroup(c, body, func() (idempotency.Response, error) { return idempotency.Response{}, groupcommit.ErrCommitAlone }, work)
}

// changeInGroup is change for requests that may use group commit. Without an
// idempotency key it calls inGroup. It calls work only if the request has a key or
// inGroup returns groupcommit.ErrCommitAlone.
func (s *Server) changeInGroup(c echo.Context, body []byte, inGroup func() (idempotency.Response, error),
	work func(tx *sqlx.Tx) (idempotency.Response, error),
) error {
	key, given, err := idempotencyKey(c, body)
	if err != nil {
		return err
	}
	var response idempotency.Response
	replayed := false
	ctx := c.Request().Context()
	err = s.shedder.Do(ctx, func() (err error) {
		if !given {
			if response, err = inGroup(); !errors.Is(err, groupcommit.ErrCommitAlone) {
				return err
			}
		}
		return postgres.InTx(ctx, s.options.DB, func(tx *sqlx.Tx) (err error) {
			if !given {
				response, err = work(tx)
				return err
			}
			response, replayed, err = s.options.Idempotency.Do(ctx, tx, key, func() (idempotency.Response, error) { return work(tx) })
			return err
		})
	})
	if err != nil {
		return err
	}
	if !replayed {
		failpoint.At(failpoint.PublishCommitted)
		s.options.Hint()
	}
	return respond(c, response, replayed)
}

func respond(c echo.Context, response idempotency.Response, replayed bool) error {
	if replayed {
		c.Response().Header().Set(headerIdempotencyReplayed, "true")
	}
	if response.Location != "" {
		c.Response().Header().Set(echo.HeaderLocation, response.Location)
	}
	return writeBody(c, response.Status, echo.MIMEApplicationJSON, response.Body)
}

// responseOf returns a response whose body is the value in JSON.
func responseOf(status int, location string, value any) (idempotency.Response, error) {
	body, err := json.Marshal(value)
	return idempotency.Response{Status: status, Location: location, Body: body}, err //nolint:wrapcheck // only a bug causes it
}

// The header's draft requires a String of RFC 9651, in double quotes. Most clients
// send the text without quotes.
var (
	quotedKey = regexp.MustCompile(`^"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])+)"$`)
	bareKey   = regexp.MustCompile(`^[\x21\x23-\x5b\x5d-\x7e]+$`)
)

// idempotencyKey returns the request's idempotency key, and whether it has one.
func idempotencyKey(c echo.Context, body []byte) (key idempotency.Key, given bool, err error) {
	r := c.Request()
	values := r.Header.Values(headerIdempotencyKey)
	if len(values) == 0 {
		return idempotency.Key{}, false, nil
	}
	text := values[0]
	switch quoted := quotedKey.FindStringSubmatch(text); {
	case quoted != nil:
		text = strings.NewReplacer(`\"`, `"`, `\\`, `\`).Replace(quoted[1])
	case !bareKey.MatchString(text):
		text = ""
	}
	if len(values) > 1 || text == "" || len(text) > idempotency.MaxKeyBytes {
		return idempotency.Key{}, false, &problem.Error{Kind: problem.InvalidIdempotencyKey}
	}
	key = idempotency.Key{Value: text, Fingerprint: fingerprint(r, body)}
	if client := admission.KeyOf(c); client != nil {
		key.Client = client.Client
	}
	return key, true, nil
}

// fingerprint hashes the request's method, path, query and body, each preceded by its
// length.
func fingerprint(r *http.Request, body []byte) (sum [sha256.Size]byte) {
	hash := sha256.New()
	for _, part := range [][]byte{[]byte(r.Method), []byte(r.URL.Path), []byte(r.URL.RawQuery), body} {
		_ = binary.Write(hash, binary.BigEndian, uint64(len(part)))
		hash.Write(part)
	}
	hash.Sum(sum[:0])
	return sum
}
