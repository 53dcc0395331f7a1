package httpapi

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

// Key is a client's API key, by its SHA-256. A key is as secret as it is hard to
// guess: the digest is no protection for a short one.
type Key struct {
	// Name stands for the key in logs and metrics.
	Name   string
	Digest [sha256.Size]byte
}

// underV1 is what needs a key and counts against limits: all that is under /v1,
// whether a route exists or not.
func underV1(c echo.Context) bool {
	for _, path := range []string{c.Request().URL.Path, c.Path()} {
		if path == "/v1" || strings.HasPrefix(path, "/v1/") {
			return true
		}
	}
	return false
}

const (
	bearerScheme = "Bearer"
	challenge    = bearerScheme + ` realm="diehard"`
)

// authenticate asks for one of the keys, unless authentication is off.
func (s *Server) authenticate(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if s.options.AuthOff || !underV1(c) {
			return next(c)
		}
		key, given := bearerToken(c.Request().Header)
		name, known := s.nameOf(key)
		if !given || !known {
			header := challenge
			if given { // RFC 6750, section 3.1
				header += `, error="invalid_token"`
			}
			c.Response().Header().Set(echo.HeaderWWWAuthenticate, header)
			return &problem.Error{Kind: problem.Unauthorized}
		}
		requestOf(c).key = name
		s.keyRequests.WithLabelValues(name).Inc()
		return next(c)
	}
}

// bearerToken returns the request's key, where it has one.
func bearerToken(header http.Header) (key string, given bool) {
	values := header.Values(echo.HeaderAuthorization)
	if len(values) != 1 {
		return "", false
	}
	scheme, key, _ := strings.Cut(values[0], " ")
	key = strings.TrimSpace(key)
	return key, strings.EqualFold(scheme, bearerScheme) && key != ""
}

// nameOf looks a key up. Neither a key that is nearly right nor its place among
// the others can be told by the time that it takes.
func (s *Server) nameOf(key string) (name string, known bool) {
	digest := sha256.Sum256([]byte(key))
	found := -1
	for i := range s.options.Keys {
		equal := subtle.ConstantTimeCompare(digest[:], s.options.Keys[i].Digest[:])
		found = subtle.ConstantTimeSelect(equal, i, found)
	}
	if found < 0 {
		return "", false
	}
	return s.options.Keys[found].Name, true
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
