// Package admission decides which requests are served. It authenticates API keys,
// limits the rates of keys and addresses, and sheds requests under load.
package admission

import (
	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"
)

// Options configure New.
type Options struct {
	// Covers reports whether a request needs a key. It is required.
	Covers func(c echo.Context) bool

	// Keys are the clients' API keys. If Keys is empty and AuthOff is false, every
	// covered request is refused.
	Keys []Key
	// AuthOff turns authentication off.
	AuthOff bool

	// RatePerKey and RatePerAddress limit the requests per second of a key and of a
	// client's address. A burst may be ten times the rate. 0 means no limit.
	RatePerKey, RatePerAddress float64

	// Registerer registers the metrics. It may be nil.
	Registerer prometheus.Registerer
}

// New returns the middleware functions in the order in which they must be used. Their
// errors are *problem.Error. New panics if the metrics are already registered.
func New(o Options) []echo.MiddlewareFunc {
	authentication := &authentication{o: o, requests: newKeyCounter(o.Registerer, o.Keys)}
	chain := []echo.MiddlewareFunc{authentication.check}
	if o.RatePerAddress > 0 { // comes first, so requests without a key count, too
		limit := limitRate(newLimiter("address", o.RatePerAddress, 1), func(c echo.Context) (client string, counts bool) {
			return addressOf(c), true
		})
		sites := limitRate(newLimiter("network", o.RatePerAddress, siteFactor), siteOf)
		chain = append([]echo.MiddlewareFunc{limit, sites}, chain...)
	}
	if o.RatePerKey > 0 {
		limit := limitRate(newLimiter("key", o.RatePerKey, 1), func(c echo.Context) (client string, counts bool) {
			key := KeyOf(c)
			if key == nil {
				return "", false
			}
			return key.Client + "/" + key.Name, true
		})
		chain = append(chain, limit)
	}
	return chain
}
