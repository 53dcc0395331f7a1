package admission

import (
	"context"
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

const (
	// slow is the minimum duration of a failed request that makes the database count as
	// unresponsive. A database that fails faster does not keep clients waiting.
	slow = time.Second
	// pingTimeout limits one ping of an unresponsive database. pingInterval is the
	// pause between two pings.
	pingTimeout  = 2 * time.Second
	pingInterval = 250 * time.Millisecond
	// maxWaiting limits the requests that wait, as a multiple of MaxConcurrent.
	maxWaiting = 10
	// maxRetryAfter limits the time after which a client may repeat a request.
	maxRetryAfter = 10 * time.Second
	// samples is the number of requests that the average duration covers, approximately.
	samples = 16
)

// ShedderOptions configure a Shedder. All fields are required.
type ShedderOptions struct {
	// MaxConcurrent limits the requests that use the database, or wait for one of
	// its connections, at the same time.
	MaxConcurrent int
	// MaxWait limits how long a request above MaxConcurrent waits, both the expected and
	// the actual time.
	MaxWait time.Duration
	// Ping returns nil if the database responds.
	Ping func(context.Context) error
	// IsOutage reports whether the error of a request means that the database is
	// unavailable. ctx is the context of the request.
	IsOutage func(ctx context.Context, err error) bool
}

// Shedder sheds requests. Requests above MaxConcurrent wait in a queue. Shedder refuses
// a request that would wait too long, and all requests while the database is
// unresponsive, because they would wait until their timeout. It is safe for concurrent use.
type Shedder struct {
	o            ShedderOptions
	inProgress   chan struct{} // the senders that wait for it are the queue, in order
	waiting      atomic.Int64
	unresponsive atomic.Bool
	noted        chan struct{} // receives a value when unresponsive becomes true

	mu       sync.Mutex
	duration time.Duration // average time in progress
	promised time.Time     // the latest time at which a shed request was told to return
}

// NewShedder returns a Shedder.
func NewShedder(o ShedderOptions) *Shedder {
	return &Shedder{o: o, inProgress: make(chan struct{}, o.MaxConcurrent), noted: make(chan struct{}, 1)}
}

// Waiting returns the number of requests that wait.
func (s *Shedder) Waiting() int { return int(s.waiting.Load()) }

// Do calls work and returns its error. If it sheds the request, it returns a
// *problem.Error. If the client disconnects while the request waits, it returns the cause
// of ctx.
func (s *Shedder) Do(ctx context.Context, work func() error) error {
	if s.unresponsive.Load() {
		return &problem.Error{Kind: problem.Unavailable}
	}
	if err := s.enter(ctx); err != nil {
		return err
	}
	defer func() { <-s.inProgress }()
	if s.unresponsive.Load() {
		return &problem.Error{Kind: problem.Unavailable}
	}
	start := time.Now()
	err := work()
	took := time.Since(start)
	s.learn(took)
	if err != nil && took >= slow && s.o.IsOutage(ctx, err) && s.unresponsive.CompareAndSwap(false, true) {
		s.noted <- struct{}{} // never blocks: Run receives the value before it sets unresponsive to false
	}
	return err
}

// enter waits until the request may be in progress.
func (s *Shedder) enter(ctx context.Context) error {
	select {
	case s.inProgress <- struct{}{}:
		return nil
	default:
	}
	n := s.waiting.Add(1)
	defer s.waiting.Add(-1)
	if n > int64(maxWaiting*s.o.MaxConcurrent) || s.expectedWait(n) > s.o.MaxWait {
		return s.shed(n)
	}
	timer := time.NewTimer(s.o.MaxWait)
	defer timer.Stop()
	select {
	case s.inProgress <- struct{}{}:
		return nil
	case <-timer.C:
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) {
			return context.Cause(ctx) //nolint:wrapcheck // the caller's own
		}
	}
	return s.shed(n)
}

// learn records the time that a request was in progress.
func (s *Shedder) learn(took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.duration == 0 {
		s.duration = took
	}
	s.duration += (took - s.duration) / samples
}

// expectedWait returns the expected time until n requests in the queue are in progress.
func (s *Shedder) expectedWait(n int64) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.timeFor(n)
}

// timeFor returns the time in which n requests end. The caller holds the lock.
func (s *Shedder) timeFor(n int64) time.Duration {
	return s.duration * time.Duration(n) / time.Duration(s.o.MaxConcurrent)
}

// shed returns the problem of a request that is shed behind n others. Its Retry-After is the
// time in which the queue and the requests that were shed before can be served. Therefore
// not all clients return at the same time.
func (s *Shedder) shed(n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if queue := now.Add(s.timeFor(n)); s.promised.Before(queue) {
		s.promised = queue
	}
	s.promised = s.promised.Add(s.timeFor(1))
	if latest := now.Add(maxRetryAfter); s.promised.After(latest) {
		s.promised = latest
	}
	seconds := math.Ceil(s.promised.Sub(now).Seconds())
	return &problem.Error{Kind: problem.Overloaded, RetryAfter: max(1, int(seconds))}
}

// Run pings an unresponsive database until it responds again. Without Run, the Shedder
// would refuse all requests after the first outage. Run returns when ctx ends, and must
// be called only once.
func (s *Shedder) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.noted:
		}
		for s.unresponsive.Load() {
			if s.ping(ctx) == nil {
				s.unresponsive.Store(false)
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

func (s *Shedder) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	return s.o.Ping(ctx)
}
