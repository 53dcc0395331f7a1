// Package admission decides which requests are served: those with an API key,
// within the rates of their key and address, and no more at once than the
// database can take.
package admission

import (
	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"
)

// Options configure New.
type Options struct {
	// Covers reports whether a request needs a key and counts against the rates.
	// It is required.
	Covers func(c echo.Context) bool

	// Keys are those that clients may use. Without keys, and with AuthOff false,
	// every request that is covered is refused.
	Keys []Key
	// AuthOff serves requests without a key.
	AuthOff bool

	// RatePerKey and RatePerAddress bound the requests of a key and of a client's
	// address, in requests a second. A client that was quiet may send ten seconds'
	// worth at once. 0 is no bound.
	RatePerKey, RatePerAddress float64

	// Registerer takes the metrics; nil is none.
	Registerer prometheus.Registerer
}

// New returns the middleware, in the order in which it has to be used. Its errors
// are *problem.Error. It panics if the registerer has the metrics already.
func New(o Options) []echo.MiddlewareFunc {
	authentication := &authentication{o: o, requests: newKeyCounter(o.Registerer, o.Keys)}
	chain := []echo.MiddlewareFunc{authentication.check}
	if o.RatePerAddress > 0 { // of requests without a key as well
		limit := limitRate(newLimiter("address", o.RatePerAddress), func(c echo.Context) (client string, counts bool) {
			return addressOf(c), o.Covers(c)
		})
		chain = append([]echo.MiddlewareFunc{limit}, chain...)
	}
	if o.RatePerKey > 0 {
		limit := limitRate(newLimiter("key", o.RatePerKey), func(c echo.Context) (client string, counts bool) {
			key := KeyName(c)
			return key, key != ""
		})
		chain = append(chain, limit)
	}
	return chain
}
