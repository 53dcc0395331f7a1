package admission

import (
	"context"
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
)

// ShedderOptions configure a Shedder. All fields are required.
type ShedderOptions struct {
	// MaxConcurrent limits the requests that use the database, or wait for one of
	// its connections, at the same time.
	MaxConcurrent int
	// Ping returns nil if the database responds.
	Ping func(context.Context) error
	// IsOutage reports whether the error of a request means that the database is
	// unavailable. ctx is the context of the request.
	IsOutage func(ctx context.Context, err error) bool
}

// Shedder sheds requests. It refuses requests above MaxConcurrent, and all requests
// while the database is unresponsive, because they would wait until their timeout.
// It is safe for concurrent use.
type Shedder struct {
	o            ShedderOptions
	inProgress   chan struct{}
	unresponsive atomic.Bool
	noted        chan struct{} // receives a value when unresponsive becomes true
}

// NewShedder returns a Shedder.
func NewShedder(o ShedderOptions) *Shedder {
	return &Shedder{o: o, inProgress: make(chan struct{}, o.MaxConcurrent), noted: make(chan struct{}, 1)}
}

// Do calls work and returns its error. If it sheds the request, it returns a
// *problem.Error at once.
func (s *Shedder) Do(ctx context.Context, work func() error) error {
	if s.unresponsive.Load() {
		return &problem.Error{Kind: problem.Unavailable}
	}
	select {
	case s.inProgress <- struct{}{}:
		defer func() { <-s.inProgress }()
	default:
		return &problem.Error{Kind: problem.Overloaded}
	}
	start := time.Now()
	err := work()
	if err != nil && time.Since(start) >= slow && s.o.IsOutage(ctx, err) && s.unresponsive.CompareAndSwap(false, true) {
		s.noted <- struct{}{} // never blocks: Run receives the value before it sets unresponsive to false
	}
	return err
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
