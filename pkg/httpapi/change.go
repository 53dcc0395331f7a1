package httpapi

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"time"

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
	headerETag                = "ETag"
	headerIfMatch             = "If-Match"
	headerAcceptPatch         = "Accept-Patch"
)

// withBody returns a handler that reads the request's body, of one of the media types. If
// the request is invalid and has an idempotency key, it may be the repetition of a request
// that was valid earlier: the limits may have changed since, for example after an upgrade.
// It then gets the stored response.
func (s *Server) withBody(handler func(c echo.Context, body *input.Object) error, mediaTypes ...string) echo.HandlerFunc {
	return func(c echo.Context) error {
		body, err := input.ReadBody(c.Response().Writer, c.Request(), s.options.MaxBodyBytes, mediaTypes...)
		if problemKind(err) == problem.UnsupportedMediaType && c.Request().Method == http.MethodPatch {
			c.Response().Header().Set(headerAcceptPatch, strings.Join(mediaTypes, ", ")) // RFC 5789
		}
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
	key, err := idempotencyKey(c, body)
	if key == nil || err != nil {
		return invalid
	}
	var response idempotency.Response
	var found bool
	ctx := c.Request().Context()
	err = s.database(ctx, func() (err error) {
		response, found, err = s.options.Idempotency.Find(ctx, *key)
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
	alone := func(*idempotency.Key) (idempotency.Response, error) {
		return idempotency.Response{}, groupcommit.ErrCommitAlone
	}
	return s.changeInGroup(c, body, alone, work)
}

// changeInGroup is change for requests that may use group commit. inGroup stores the
// response under the key, which is nil for a request without one. changeInGroup calls work
// only if inGroup returns groupcommit.ErrCommitAlone.
func (s *Server) changeInGroup(c echo.Context, body []byte, inGroup func(key *idempotency.Key) (idempotency.Response, error),
	work func(tx *sqlx.Tx) (idempotency.Response, error),
) error {
	key, err := idempotencyKey(c, body)
	if err != nil {
		return err
	}
	var response idempotency.Response
	replayed := false
	ctx := c.Request().Context()
	err = s.database(ctx, func() error {
		return s.inPublishSpan(ctx, func() (err error) {
			if response, err = inGroup(key); !errors.Is(err, groupcommit.ErrCommitAlone) {
				return err
			}
			return s.inTx(ctx, func(tx *sqlx.Tx) (err error) {
				if key == nil {
					response, err = work(tx)
					return err
				}
				response, replayed, err = s.options.Idempotency.Do(ctx, tx, *key, func() (idempotency.Response, error) { return work(tx) })
				return err
			})
		})
	})
	if err != nil {
		return err
	}
	if !replayed {
		failpoint.At(failpoint.PublishCommitted)
		s.options.Hint()
	}
	return respond(c, response, replayed || response.Replayed)
}

func respond(c echo.Context, response idempotency.Response, replayed bool) error {
	if replayed {
		c.Response().Header().Set(headerIdempotencyReplayed, "true")
	}
	if response.Location != "" {
		c.Response().Header().Set(echo.HeaderLocation, response.Location)
	}
	if response.ETag != "" {
		c.Response().Header().Set(headerETag, response.ETag)
	}
	if response.Status == http.StatusNoContent {
		return c.NoContent(response.Status) //nolint:wrapcheck // only a client that has disconnected causes it
	}
	return writeBody(c, response.Status, echo.MIMEApplicationJSON, response.Body)
}

// maxTries limits the tries of a transaction that conflicts with others.
const maxTries = 3

// inTx runs work in a transaction. After a conflict, such as a deadlock, the transaction is
// rolled back, so inTx repeats it. If a lock is not available within the session's
// lock_timeout, the transaction begins again and waits longer, unless enough other
// transactions wait: each of them holds a connection.
func (s *Server) inTx(ctx context.Context, work func(tx *sqlx.Tx) error) (err error) {
	waits := false
	for range maxTries {
		if waits {
			err = s.inTxWaiting(ctx, work)
		} else {
			err = postgres.InTx(ctx, s.options.DB, work)
		}
		switch {
		case postgres.IsLockTimeout(err) && !waits:
			waits = true
		case !postgres.IsConflict(err):
			return err
		}
	}
	return err
}

// longLockTimeout limits the wait for a lock of the few transactions that wait longer than
// LockTimeout.
const longLockTimeout = 2 * time.Second

func (s *Server) inTxWaiting(ctx context.Context, work func(tx *sqlx.Tx) error) error {
	select {
	case s.lockWaits <- struct{}{}:
		defer func() { <-s.lockWaits }()
	default:
		return &problem.Error{Kind: problem.Locked}
	}
	return postgres.InTx(ctx, s.options.DB, func(tx *sqlx.Tx) error {
		if _, err := tx.ExecContext(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", longLockTimeout.Milliseconds())); err != nil {
			return fmt.Errorf("set lock_timeout: %w", err)
		}
		return work(tx)
	})
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

// idempotencyKey returns the request's idempotency key, or nil if it has none.
func idempotencyKey(c echo.Context, body []byte) (*idempotency.Key, error) {
	r := c.Request()
	values := r.Header.Values(headerIdempotencyKey)
	if len(values) == 0 {
		return nil, nil //nolint:nilnil // there is no key
	}
	text := values[0]
	switch quoted := quotedKey.FindStringSubmatch(text); {
	case quoted != nil:
		text = strings.NewReplacer(`\"`, `"`, `\\`, `\`).Replace(quoted[1])
	case !bareKey.MatchString(text):
		text = ""
	}
	if len(values) > 1 || text == "" || len(text) > idempotency.MaxKeyBytes {
		return nil, &problem.Error{Kind: problem.InvalidIdempotencyKey}
	}
	return &idempotency.Key{Client: clientOf(c), Value: text, Fingerprint: fingerprint(r, body)}, nil
}

// clientOf returns the name of the client. It is empty if authentication is off.
func clientOf(c echo.Context) string {
	if key := admission.KeyOf(c); key != nil {
		return key.Client
	}
	return ""
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
