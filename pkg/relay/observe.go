package relay

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

const (
	// observeInterval is the time between two readings of the sink's figures.
	observeInterval = 15 * time.Second
	observeTimeout  = 10 * time.Second
)

// sinkFigures are the figures of the sink at the last reading. It is a collector whose
// metrics are unknown before.
type sinkFigures struct {
	mu      sync.Mutex
	figures []sink.Figure
}

// Describe implements prometheus.Collector.
func (*sinkFigures) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (f *sinkFigures) Collect(samples chan<- prometheus.Metric) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, figure := range f.figures {
		samples <- prometheus.MustNewConstMetric(prometheus.NewDesc(figure.Name, figure.Help, nil, nil), prometheus.GaugeValue, figure.Value)
	}
}

func (f *sinkFigures) set(figures []sink.Figure) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.figures = figures
}

// observeUntil reads the figures of the sink until ctx ends, apart from scrapes. While the
// circuit breaker is open, it asks nothing, and there are no figures.
func (r *Relay) observeUntil(ctx context.Context) error {
	observer, ok := r.o.Sink.(sink.Observer)
	if !ok {
		return nil
	}
	readings := time.NewTicker(observeInterval)
	defer readings.Stop()
	for {
		r.figures.set(nil)
		if err := r.circuit.awaitClosed(ctx); err != nil {
			return err
		}
		figures, err := r.observe(ctx, observer)
		if err != nil && ctx.Err() == nil {
			r.log.DebugContext(ctx, "reading figures of sink failed", "err", err) // the circuit breaker reports an outage
		}
		r.figures.set(figures)
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller has ended ctx
		case <-readings.C:
		}
	}
}

func (r *Relay) observe(ctx context.Context, observer sink.Observer) ([]sink.Figure, error) {
	ctx, cancel := context.WithTimeout(ctx, observeTimeout)
	defer cancel()
	return observer.Observe(ctx)
}
