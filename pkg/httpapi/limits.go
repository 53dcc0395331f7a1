package httpapi

import (
	"context"
	"fmt"
	"math"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/labstack/echo/v4"
	"golang.org/x/time/rate"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

const (
	// burstSeconds is for how long a client that was quiet may go on at once:
	// what its bucket holds.
	burstSeconds = 10
	// maxBuckets bounds the memory for clients; the one that was quiet for the
	// longest time goes, and is full when it comes back.
	maxBuckets = 1 << 16

	headerRateLimit       = "Ratelimit" // as net/http writes it
	headerRateLimitPolicy = "Ratelimit-Policy"
)

// limiter bounds the requests of each client, by a token bucket.
type limiter struct {
	policy  string // its name, in headers
	rate    rate.Limit
	burst   int
	buckets *lru.Cache[string, *rate.Limiter]
}

// newLimiter returns a limiter of that many requests a second; of 0 it is nil,
// which bounds nothing.
func newLimiter(policy string, perSecond float64) *limiter {
	if perSecond <= 0 {
		return nil
	}
	buckets, err := lru.New[string, *rate.Limiter](maxBuckets)
	if err != nil { // unreachable: the size is positive
		panic(err)
	}
	return &limiter{
		policy: policy, rate: rate.Limit(perSecond), buckets: buckets,
		burst: max(1, int(math.Ceil(perSecond*burstSeconds))),
	}
}

// take takes a token of the client's, tells it in headers how many are left, and
// returns the problem where there was none.
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

// seconds is how long that many tokens take.
func (l *limiter) seconds(tokens float64) int { return int(math.Ceil(tokens / float64(l.rate))) }

// limitAddress bounds the requests of an address, whether they have a key or
// not.
func (s *Server) limitAddress(next echo.HandlerFunc) echo.HandlerFunc {
	if s.byAddress == nil {
		return next
	}
	return func(c echo.Context) error {
		if underV1(c) {
			if err := s.byAddress.take(c, addressOf(c)); err != nil {
				return err
			}
		}
		return next(c)
	}
}

// limitKey bounds the requests with a key.
func (s *Server) limitKey(next echo.HandlerFunc) echo.HandlerFunc {
	if s.byKey == nil {
		return next
	}
	return func(c echo.Context) error {
		if key := requestOf(c).key; key != "" {
			if err := s.byKey.take(c, key); err != nil {
				return err
			}
		}
		return next(c)
	}
}

// ipv6Network is what one client has of addresses: all of a /64 are its own.
const ipv6Network = 64

// addressOf returns the client's address.
func addressOf(c echo.Context) string {
	text, _, _ := strings.Cut(c.RealIP(), "%") // a link-local address's zone
	address, err := netip.ParseAddr(text)
	if err != nil {
		return text
	}
	address = address.Unmap()
	if address.Is4() {
		return address.String()
	}
	network, _ := address.Prefix(ipv6Network) // never fails for 64 bits of 128
	return network.String()
}

// clientAddress returns how the client's address is found: it is the connection's
// own, or what a trusted proxy says of it in X-Forwarded-For.
func clientAddress(trusted []netip.Prefix) echo.IPExtractor {
	if len(trusted) == 0 {
		return echo.ExtractIPDirect()
	}
	options := []echo.TrustOption{echo.TrustLoopback(false), echo.TrustLinkLocal(false), echo.TrustPrivateNet(false)}
	for _, prefix := range trusted {
		options = append(options, echo.TrustIPRange(&net.IPNet{
			IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
		}))
	}
	return echo.ExtractIPFromXFFHeader(options...)
}

// gate stands before the database. It lets so many requests through at once that
// they do not drown the pool of connections, and none while the database keeps
// silent: those who come then are answered at once.
type gate struct {
	places chan struct{}
	ping   func(context.Context) error
	silent atomic.Bool
	noted  chan struct{} // silent has become true
}

const (
	// slow is from when on a failure is taken for silence. What fails at once
	// needs no help.
	slow = time.Second
	// pingTimeout bounds one question whether the database is back, and
	// pingInterval is the pause between two.
	pingTimeout  = 2 * time.Second
	pingInterval = 250 * time.Millisecond
)

func newGate(places int, ping func(context.Context) error) *gate {
	return &gate{places: make(chan struct{}, places), ping: ping, noted: make(chan struct{}, 1)}
}

// through does the work at the database.
func (g *gate) through(ctx context.Context, work func() error) error {
	if g.silent.Load() {
		return &problem.Error{Kind: problem.Unavailable}
	}
	select {
	case g.places <- struct{}{}:
		defer func() { <-g.places }()
	default:
		return &problem.Error{Kind: problem.Overloaded}
	}
	start := time.Now()
	err := work()
	if err != nil && time.Since(start) >= slow && problemOf(ctx, err).Kind.Status >= problem.Unavailable.Status &&
		g.silent.CompareAndSwap(false, true) {
		g.noted <- struct{}{} // never waits: run takes it before it makes silent false
	}
	return err
}

// run opens the gate again whenever the database answers, until ctx ends.
func (g *gate) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.noted:
		}
		for g.silent.Load() {
			ping, cancel := context.WithTimeout(ctx, pingTimeout)
			err := g.ping(ping)
			cancel()
			if err == nil {
				g.silent.Store(false)
				break
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(pingInterval):
			}
		}
	}
}
