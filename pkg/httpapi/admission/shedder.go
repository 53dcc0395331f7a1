package admission

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

const (
	// slow is how long a failure has to take to count as silence of the database.
	// Clients need no protection from a database that fails at once.
	slow = time.Second
	// pingTimeout bounds one ping of a silent database, and pingInterval is the
	// pause between two.
	pingTimeout  = 2 * time.Second
	pingInterval = 250 * time.Millisecond
)

// ShedderOptions configure a Shedder. All fields are required.
type ShedderOptions struct {
	// MaxConcurrent bounds the requests that work with the database at once, or
	// wait for one of its connections.
	MaxConcurrent int
	// Ping returns nil if the database answers.
	Ping func(context.Context) error
	// IsOutage reports whether the error of a request with the context means that
	// the database is unavailable.
	IsOutage func(ctx context.Context, err error) bool
}

// Shedder protects the database and its callers. It refuses requests that would
// queue for a connection, and all requests while the database is silent: these
// would only wait for their timeout. It is safe for concurrent use.
type Shedder struct {
	o      ShedderOptions
	places chan struct{}
	silent atomic.Bool
	noted  chan struct{} // silent has become true
}

// NewShedder returns a Shedder.
func NewShedder(o ShedderOptions) *Shedder {
	return &Shedder{o: o, places: make(chan struct{}, o.MaxConcurrent), noted: make(chan struct{}, 1)}
}

// Do does the work at the database and returns its error. It returns a
// *problem.Error at once if the request is shed.
func (s *Shedder) Do(ctx context.Context, work func() error) error {
	if s.silent.Load() {
		return &problem.Error{Kind: problem.Unavailable}
	}
	select {
	case s.places <- struct{}{}:
		defer func() { <-s.places }()
	default:
		return &problem.Error{Kind: problem.Overloaded}
	}
	start := time.Now()
	err := work()
	if err != nil && time.Since(start) >= slow && s.o.IsOutage(ctx, err) && s.silent.CompareAndSwap(false, true) {
		s.noted <- struct{}{} // never blocks: Run receives it before it makes silent false
	}
	return err
}

// Run pings a silent database until it answers again. It returns when ctx ends,
// and is called once. Without it, a database that was silent stays unavailable.
func (s *Shedder) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.noted:
		}
		for s.silent.Load() {
			if s.ping(ctx) == nil {
				s.silent.Store(false)
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
