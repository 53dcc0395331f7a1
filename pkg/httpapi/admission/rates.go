package admission

import (
	"fmt"
	"math"
	"strconv"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/labstack/echo/v4"
	"golang.org/x/time/rate"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

const (
	// burstSeconds is the time in which an empty bucket becomes full.
	burstSeconds = 10
	// maxBuckets limits the memory for clients. The limiter drops the bucket that
	// was not used for the longest time. A dropped bucket is full again when its
	// client returns.
	maxBuckets = 1 << 16

	headerRateLimit       = "Ratelimit" // the spelling of net/http
	headerRateLimitPolicy = "Ratelimit-Policy"
)

// limitRate returns middleware that takes one of the client's tokens for each
// request that counts.
func limitRate(l *limiter, clientOf func(echo.Context) (client string, counts bool)) echo.MiddlewareFunc {
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			if client, counts := clientOf(c); counts {
				if err := l.take(c, client); err != nil {
					return err
				}
			}
			return next(c)
		}
	}
}

// limiter has a token bucket for each client.
type limiter struct {
	policy  string // the name in headers
	rate    rate.Limit
	burst   int
	buckets *lru.Cache[string, *rate.Limiter]
}

// newLimiter returns a limiter that allows each client perSecond requests per second. With
// several clients in one bucket, the bucket has the sum of their limits.
func newLimiter(policy string, perSecond float64, clients int) *limiter {
	buckets, err := lru.New[string, *rate.Limiter](maxBuckets)
	if err != nil { // unreachable: the size is positive
		panic(err)
	}
	return &limiter{
		policy: policy, rate: rate.Limit(perSecond * float64(clients)), buckets: buckets,
		burst: clients * max(1, int(math.Ceil(perSecond*burstSeconds))),
	}
}

// take takes one of the client's tokens, and sets the headers with the number of
// tokens left. It returns a problem if the bucket was empty.
func (l *limiter) take(c echo.Context, client string) error {
	bucket, known := l.buckets.Get(client)
	if !known {
		bucket = rate.NewLimiter(l.rate, l.burst)
		if earlier, raced, _ := l.buckets.PeekOrAdd(client, bucket); raced {
			bucket = earlier
		}
	}
	now := time.Now()
	allowed := bucket.AllowN(now, 1)
	tokens := max(0, bucket.TokensAt(now))
	header := c.Response().Header()
	header.Add(headerRateLimitPolicy, fmt.Sprintf("%q;q=%d;w=%d", l.policy, l.burst, l.seconds(float64(l.burst))))
	header.Add(headerRateLimit, fmt.Sprintf("%q;r=%d;t=%d", l.policy, int(tokens), l.seconds(float64(l.burst)-tokens)))
	if !allowed {
		header.Set(echo.HeaderRetryAfter, strconv.Itoa(max(1, l.seconds(1-tokens))))
		return &problem.Error{Kind: problem.RateLimited}
	}
	return nil
}

// seconds returns the time in seconds to refill the tokens.
func (l *limiter) seconds(tokens float64) int { return int(math.Ceil(tokens / float64(l.rate))) }
