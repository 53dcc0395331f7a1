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

// Key is a client's API key, by its SHA-256. The digest does not protect a short
// key: a key is as secret as it is hard to guess.
type Key struct {
	// Name stands for the key in logs and metrics.
	Name   string
	Digest [sha256.Size]byte
}

const (
	bearerScheme = "Bearer"
	challenge    = bearerScheme + ` realm="diehard"`
)

// authentication refuses requests without one of the keys.
type authentication struct {
	o        Options
	requests *prometheus.CounterVec
}

// check is its middleware.
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

// KeyName returns the name of the API key that the request came with. It is empty
// before the middleware has accepted a key.
func KeyName(c echo.Context) string {
	name, _ := c.Get(keyNameKey).(string)
	return name
}

// bearerToken returns the request's key, if it has one.
func bearerToken(header http.Header) (key string, given bool) {
	values := header.Values(echo.HeaderAuthorization)
	if len(values) != 1 {
		return "", false
	}
	scheme, key, _ := strings.Cut(values[0], " ")
	key = strings.TrimSpace(key)
	return key, strings.EqualFold(scheme, bearerScheme) && key != ""
}

// nameOf looks a key up. The time that it takes depends neither on how much of the
// key is right nor on its place among the keys.
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
		Help: "Requests that came with the API key, whatever their answer.",
	}, []string{"key"})
	for _, key := range keys {
		counter.WithLabelValues(key.Name) // 0 tells that a key is no longer used
	}
	return counter
}
