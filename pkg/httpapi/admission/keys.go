package admission

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

// Key is the SHA-256 digest of a client's API key. The digest does not protect a
// key that is easy to guess.
type Key struct {
	// Client is the name of the client. A client may have several keys, for example during
	// a rotation.
	Client string
	// Name distinguishes the keys of the client in logs and metrics.
	Name   string
	Digest [sha256.Size]byte
	// Scopes are the rights of the key; see package scope. A key without scopes has all
	// rights.
	Scopes []string
}

const (
	bearerScheme = "Bearer"
	challenge    = bearerScheme + ` realm="diehard"`
)

// authentication refuses requests without a known key.
type authentication struct {
	o        Options
	requests *prometheus.CounterVec
}

// check is the middleware.
func (a *authentication) check(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if a.o.AuthOff || !a.o.Covers(c) {
			return next(c)
		}
		token, given := bearerToken(c.Request().Header)
		key := a.find(token)
		if !given || key == nil {
			header := challenge
			if given { // RFC 6750, section 3.1
				header += `, error="invalid_token"`
			}
			c.Response().Header().Set(echo.HeaderWWWAuthenticate, header)
			return &problem.Error{Kind: problem.Unauthorized}
		}
		c.Set(contextKey, key)
		a.requests.WithLabelValues(key.Client, key.Name).Inc()
		return next(c)
	}
}

const contextKey = "diehard.admission.key"

// KeyOf returns the request's API key. It is nil before the middleware has accepted the
// key, and if authentication is off.
func KeyOf(c echo.Context) *Key {
	key, _ := c.Get(contextKey).(*Key)
	return key
}

// Require returns middleware that refuses keys without the scope.
func Require(scope string) echo.MiddlewareFunc {
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			if key := KeyOf(c); key != nil && len(key.Scopes) > 0 && !slices.Contains(key.Scopes, scope) {
				// RFC 6750, section 3.1
				c.Response().Header().Set(echo.HeaderWWWAuthenticate, fmt.Sprintf(`%s, error="insufficient_scope", scope=%q`, challenge, scope))
				return &problem.Error{Kind: problem.InsufficientScope, Detail: "The API key has no right to this request: it needs the scope " + scope}
			}
			return next(c)
		}
	}
}

// bearerToken returns the request's key, and whether the request has one.
func bearerToken(header http.Header) (key string, given bool) {
	values := header.Values(echo.HeaderAuthorization)
	if len(values) != 1 {
		return "", false
	}
	scheme, key, _ := strings.Cut(values[0], " ")
	key = strings.TrimSpace(key)
	return key, strings.EqualFold(scheme, bearerScheme) && key != ""
}

// find returns the key with this text, or nil. Its running time does not depend on how
// much of the text is correct, or on the key's position in the list.
func (a *authentication) find(text string) *Key {
	digest := sha256.Sum256([]byte(text))
	found := -1
	for i := range a.o.Keys {
		equal := subtle.ConstantTimeCompare(digest[:], a.o.Keys[i].Digest[:])
		found = subtle.ConstantTimeSelect(equal, i, found)
	}
	if found < 0 {
		return nil
	}
	return &a.o.Keys[found]
}

func newKeyCounter(registerer prometheus.Registerer, keys []Key) *prometheus.CounterVec {
	counter := promauto.With(registerer).NewCounterVec(prometheus.CounterOpts{
		Name: "diehard_http_key_requests_total",
		Help: "Requests with the API key, including refused ones.",
	}, []string{"client", "key"})
	for _, key := range keys {
		counter.WithLabelValues(key.Client, key.Name) // 0 shows that a key is unused
	}
	return counter
}
