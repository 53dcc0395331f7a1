package admission

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"strings"

	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

// Key is the SHA-256 digest of a client's API key. The digest does not protect a
// key that is easy to guess.
type Key struct {
	// Name identifies the key in logs and metrics.
	Name   string
	Digest [sha256.Size]byte
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
		key, given := bearerToken(c.Request().Header)
		name, known := a.nameOf(key)
		if !given || !known {
			header := challenge
			if given { // RFC 6750, section 3.1
				header += `, error="invalid_token"`
			}
			c.Response().Header().Set(echo.HeaderWWWAuthenticate, header)
			return &problem.Error{Kind: problem.Unauthorized}
		}
		c.Set(keyNameKey, name)
		a.requests.WithLabelValues(name).Inc()
		return next(c)
	}
}

const keyNameKey = "diehard.admission.key"

// KeyName returns the name of the request's API key. It is empty before the
// middleware has accepted the key.
func KeyName(c echo.Context) string {
	name, _ := c.Get(keyNameKey).(string)
	return name
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

// nameOf returns the name of a key. Its running time does not depend on how much
// of the key is correct, or on the key's position in the list.
func (a *authentication) nameOf(key string) (name string, known bool) {
	digest := sha256.Sum256([]byte(key))
	found := -1
	for i := range a.o.Keys {
		equal := subtle.ConstantTimeCompare(digest[:], a.o.Keys[i].Digest[:])
		found = subtle.ConstantTimeSelect(equal, i, found)
	}
	if found < 0 {
		return "", false
	}
	return a.o.Keys[found].Name, true
}

func newKeyCounter(registerer prometheus.Registerer, keys []Key) *prometheus.CounterVec {
	counter := promauto.With(registerer).NewCounterVec(prometheus.CounterOpts{
		Name: "diehard_http_key_requests_total",
		Help: "Requests with the API key, including refused ones.",
	}, []string{"key"})
	for _, key := range keys {
		counter.WithLabelValues(key.Name) // 0 shows that a key is unused
	}
	return counter
}
