// Package relay delivers events from the outbox to a sink: it cuts waiting events into
// batches, claims a batch, inserts it and settles it. It uses the sink only through the
// interface sink.Sink.
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Defaults of Options.
const (
	DefaultWorkers         = 2
	DefaultLinger          = 250 * time.Millisecond
	DefaultPollInterval    = 5 * time.Second
	DefaultFlushTimeout    = 30 * time.Second
	DefaultShutdownTimeout = 35 * time.Second
	DefaultBackoffMin      = 500 * time.Millisecond
	DefaultBackoffMax      = 30 * time.Second

	DefaultDeadLetterAttempts = 5
	DefaultDeadLetterAfter    = time.Minute
)

// Options configure a Relay. Store, Sink, Log and Registry are required. A duration or
// number that is zero gets its default.
type Options struct {
	Store *store.Store
	Sink  sink.Sink
	// Published wakes the relay when events were published, and BatchesCut when another
	// relay has cut batches. Without these signals, the next poll finds the events and
	// the batches. Both channels may be nil.
	Published, BatchesCut <-chan struct{}
	Log                   *slog.Logger
	// Registry receives the metrics of the relay and of the outbox.
	Registry prometheus.Registerer
	// Member is this relay as it reports itself to the fleet, without its state. New sets
	// an ID if it has none.
	Member store.Member
	// Tracer makes the spans of cuts and deliveries. If it is nil, they have no spans.
	// SinkAttributes describe the sink in spans, such as db.system.name.
	Tracer         trace.Tracer
	SinkAttributes attribute.Set

	// Workers is the number of batches that are delivered at the same time, if MaxBytes
	// allows.
	Workers int
	// MaxBytes bounds the events that the process holds in memory, over all workers. The
	// default is store.DefaultMaxBytes. If two batches exceed MaxBytes, the second batch
	// waits until the first is settled.
	MaxBytes int64
	// Linger is the least time between two cuts of partial batches in the fleet.
	Linger time.Duration
	// PollInterval is the time between two polls for work.
	PollInterval time.Duration
	// FlushTimeout bounds one insert, including its execution by the sink.
	FlushTimeout time.Duration
	// ShutdownTimeout is the time that Run waits for deliveries after its context has
	// ended. Run then releases the batches that are not delivered.
	ShutdownTimeout time.Duration
	// BackoffMin and BackoffMax bound the pauses after consecutive failures.
	BackoffMin, BackoffMax time.Duration
	// DeadLetterAttempts is the number of failed attempts after which an event that may be
	// their cause becomes a dead letter. DeadLetterAfter is the least time that the event
	// has failed alone. An event that the sink refuses because of a rule of the table, or
	// that it can never store, becomes a dead letter at once.
	DeadLetterAttempts int
	DeadLetterAfter    time.Duration
	// Vacuum lets the fleet vacuum outbox_events if many rows are dead and the role may.
	Vacuum bool
	// DeadLetterRetention and AuditRetention are the ages at which the fleet deletes dead
	// letters and the records of operators' actions. 0 keeps them.
	DeadLetterRetention, AuditRetention time.Duration
}

func (o *Options) setDefaults() {
	if o.Workers <= 0 {
		o.Workers = DefaultWorkers
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = store.DefaultMaxBytes
	}
	if o.Tracer == nil {
		o.Tracer = noop.Tracer{}
	}
	if o.DeadLetterAttempts <= 0 {
		o.DeadLetterAttempts = DefaultDeadLetterAttempts
	}
	for _, d := range []struct {
		value    *time.Duration
		fallback time.Duration
	}{
		{&o.Linger, DefaultLinger},
		{&o.PollInterval, DefaultPollInterval},
		{&o.FlushTimeout, DefaultFlushTimeout},
		{&o.ShutdownTimeout, DefaultShutdownTimeout},
		{&o.BackoffMin, DefaultBackoffMin},
		{&o.BackoffMax, DefaultBackoffMax},
		{&o.DeadLetterAfter, DefaultDeadLetterAfter},
	} {
		if *d.value <= 0 {
			*d.value = d.fallback
		}
	}
}

// Relay is one process of the fleet.
type Relay struct {
	o       Options
	log     *slog.Logger
	tracer  trace.Tracer
	metrics *metrics
	circuit *circuit
	budget  *budget
	backoff backoff

	work     signal       // batches may be claimed
	capacity signal       // a batch was claimed, or a worker is free: more batches may be cut
	busy     atomic.Int32 // workers that deliver a batch
	failing  atomic.Bool  // a worker delivers a failing batch
	took     atomic.Int64 // duration of the last batch settled at its first attempt, in ns

	backpressure atomic.Int32 // doublings of the linger because the sink is overloaded
	postgres     *postgresState
	blind        blindness
	elsewhere    elsewhere
	evidence     evidence
	fuse, pause  transition
	figures      sinkFigures
	tidy         *housekeeping
	watchdog     *watchdog
	turns        map[loop]*atomic.Int64 // the last turn of each loop, in ns since 1970
	events       sync.Pool              // of *store.Events, whose memory the attempts reuse
}

// New returns a Relay and registers its metrics.
func New(o Options) *Relay {
	o.setDefaults()
	if o.Member.ID == uuid.Nil {
		o.Member.ID = uuid.New()
	}
	r := &Relay{
		o:        o,
		log:      o.Log,
		tracer:   o.Tracer,
		budget:   &budget{limit: o.MaxBytes},
		backoff:  backoff{base: o.BackoffMin, limit: o.BackoffMax},
		work:     make(signal, o.Workers),
		capacity: make(signal, 1),
		postgres: newPostgresState(),
		watchdog: newWatchdog(o.PollInterval),
		turns:    map[loop]*atomic.Int64{},
	}
	for _, loop := range loops {
		r.turns[loop] = &atomic.Int64{}
	}
	r.tidy = newHousekeeping(o.Registry)
	r.circuit = newCircuit(r.probe, r.backoff, o.Log)
	r.blind.lifetime = 2*o.BackoffMax + o.FlushTimeout // the next attempt of the batch has ended by then
	r.metrics = newMetrics(o.Registry,
		func() bool { return r.circuit.err() != nil },
		func() bool { return r.blind.err() != nil },
		func() bool { return r.postgres.err() != nil },
		func() bool { return o.Store.Fuse() != nil },
		func() bool { return r.watchdog.err() != nil })
	o.Registry.MustRegister(newOutboxCollector(o.Store, r.tasks()), newRelayCollector(r), &r.figures)
	return r
}

// Ready returns nil if the relay can deliver and no event is stalled. Otherwise it returns
// the reason.
func (r *Relay) Ready(context.Context) error {
	return r.withStall(r.ready())
}

func (r *Relay) ready() error {
	if err := r.fault(); err != nil {
		return err
	}
	if err := r.blind.err(); err != nil {
		return fmt.Errorf("sink: presence check: %w", err)
	}
	if err := r.elsewhere.err(); err != nil {
		return err
	}
	return r.o.Store.Fuse()
}

// fault returns the fault of PostgreSQL or of the sink that stops this relay, or nil.
func (r *Relay) fault() error {
	if err := r.postgres.err(); err != nil {
		return fmt.Errorf("postgresql: %w", err)
	}
	if err := r.circuit.err(); err != nil {
		return fmt.Errorf("sink: %w", err)
	}
	return nil
}

// Run delivers until ctx ends. Then it claims no more batches, finishes deliveries within
// ShutdownTimeout, releases the unfinished batches and returns nil. It returns a
// *sink.MisconfiguredError if the first check finds that the sink cannot keep its
// promises. It retries after all other errors.
func (r *Relay) Run(ctx context.Context) error {
	// Deliveries continue after ctx has ended, until ShutdownTimeout has passed.
	delivering, stopDelivering := context.WithCancel(context.WithoutCancel(ctx))
	defer stopDelivering()

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return r.cutUntil(ctx) })
	group.Go(func() error { return r.watchUntil(ctx) })
	group.Go(func() error { return r.reportUntil(ctx) })
	group.Go(func() error { return r.countUntil(ctx) })
	group.Go(func() error { return r.observeUntil(ctx) })
	group.Go(func() error { return r.tidyUntil(ctx) })
	for range r.o.Workers {
		group.Go(func() error { return r.deliverUntil(ctx, delivering) })
	}
	stop := context.AfterFunc(ctx, func() {
		time.AfterFunc(r.o.ShutdownTimeout, stopDelivering)
	})
	defer stop()

	err := group.Wait()
	r.leave(ctx)
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err //nolint:wrapcheck // an error of this package
}

// probe checks whether the sink is available and can keep its promises. It reads the
// destination that claims record.
func (r *Relay) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, r.o.FlushTimeout)
	defer cancel()
	if err := r.o.Sink.Check(ctx); err != nil {
		return err
	}
	destination, err := r.o.Sink.Destination(ctx)
	if err != nil {
		return err
	}
	r.o.Store.SetDestination(destination)
	return nil
}
