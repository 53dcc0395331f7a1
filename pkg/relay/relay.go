// Package relay carries batches of events from the outbox to a sink: it cuts
// what waits into batches, claims them, sends each and settles it. It knows
// the sink by its contract only.
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
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
)

// Options configure a Relay. Store, Sink, Log and Registry are required; a
// duration or number that is zero takes its default.
type Options struct {
	Store *store.Store
	Sink  sink.Sink
	// Published tells that events were published and BatchesCut that another
	// relay has cut batches, before the next poll finds them. Both may be nil.
	Published, BatchesCut <-chan struct{}
	Log                   *slog.Logger
	// Registry takes the relay's and the outbox's metrics.
	Registry prometheus.Registerer

	// Workers is how many batches are sent at once, as far as MaxBytes allows.
	Workers int
	// MaxBytes bounds the events that the process holds in memory at once,
	// over all of its workers; store.DefaultMaxBytes by default. Where two of the
	// Store's batches do not fit, one waits until the other is settled.
	MaxBytes int64
	// Linger is the least time between two cuts of the fleet that do not fill
	// a batch.
	Linger time.Duration
	// PollInterval is how long an idle relay goes without looking for work
	// when nothing wakes it.
	PollInterval time.Duration
	// FlushTimeout bounds one insert, at the sink too.
	FlushTimeout time.Duration
	// ShutdownTimeout is what Run gives the batches that are being sent when
	// its context ends; then they are released.
	ShutdownTimeout time.Duration
	// BackoffMin and BackoffMax bound the pauses after failures in a row.
	BackoffMin, BackoffMax time.Duration
}

func (o *Options) setDefaults() {
	if o.Workers <= 0 {
		o.Workers = DefaultWorkers
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = store.DefaultMaxBytes
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
	} {
		if *d.value <= 0 {
			*d.value = d.fallback
		}
	}
}

// Relay is one process's share of the fleet.
type Relay struct {
	o       Options
	log     *slog.Logger
	metrics *metrics
	circuit *circuit
	budget  *budget
	backoff backoff

	work signal       // batches may be claimed
	room signal       // a batch was claimed, or a worker is free: there may be room for more
	busy atomic.Int32 // workers that have a batch
	took atomic.Int64 // the nanoseconds of the last batch that was sent once and settled

	strain   atomic.Int32 // doublings of the linger under the sink's back-pressure
	postgres postgresState
}

// New returns a Relay and registers its metrics.
func New(o Options) *Relay {
	o.setDefaults()
	r := &Relay{
		o:       o,
		log:     o.Log,
		budget:  &budget{limit: o.MaxBytes},
		backoff: backoff{base: o.BackoffMin, limit: o.BackoffMax},
		work:    make(signal, o.Workers),
		room:    make(signal, 1),
	}
	r.circuit = newCircuit(r.probe, r.backoff, o.Log)
	r.metrics = newMetrics(o.Registry, func() bool { return r.circuit.err() != nil })
	o.Registry.MustRegister(newOutboxCollector(o.Store))
	return r
}

// Ready returns nil while the relay can deliver, and otherwise why not.
func (r *Relay) Ready(context.Context) error {
	if err := r.postgres.err(); err != nil {
		return fmt.Errorf("postgresql: %w", err)
	}
	if err := r.circuit.err(); err != nil {
		return fmt.Errorf("sink: %w", err)
	}
	return nil
}

// Run delivers until ctx ends. Then it claims nothing more, finishes what is
// being sent within ShutdownTimeout, releases the rest and returns nil. It
// returns a *sink.MisconfiguredError where the sink, when first seen, cannot
// keep the promise of delivery; other errors it outlives.
func (r *Relay) Run(ctx context.Context) error {
	// What is being sent outlives ctx, until the time for it is up.
	sending, stopSending := context.WithCancel(context.WithoutCancel(ctx))
	defer stopSending()

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return r.cutUntil(ctx) })
	for range r.o.Workers {
		group.Go(func() error { return r.deliverUntil(ctx, sending) })
	}
	stop := context.AfterFunc(ctx, func() {
		time.AfterFunc(r.o.ShutdownTimeout, stopSending)
	})
	defer stop()

	err := group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err //nolint:wrapcheck // the relay's own
}

// probe asks whether the sink is there and fit.
func (r *Relay) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, r.o.FlushTimeout)
	defer cancel()
	return r.o.Sink.Check(ctx)
}
