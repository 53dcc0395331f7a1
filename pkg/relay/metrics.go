package relay

import (
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// The values of the label result of diehard_relay_batches_total.
const (
	resultSettled      = "settled"       // the first insert was acknowledged
	resultResolved     = "resolved"      // a presence check found all events
	resultRetried      = "retried"       // returned after an error
	resultTokenRenewed = "token_renewed" // returned under a new token
	resultSplit        = "split"         // split into several batches, or reduced to some of its events
	resultReleased     = "released"      // released by a shutdown, or lost because PostgreSQL failed
)

// The values of the label result of diehard_relay_events_total.
const (
	resultDelivered    = "delivered"
	resultDeadLettered = "dead_lettered"
)

type metrics struct {
	events    *prometheus.CounterVec
	batches   *prometheus.CounterVec
	attempted prometheus.Counter
	failed    prometheus.Counter
	errors    *prometheus.CounterVec
	rows      prometheus.Histogram
	flush     prometheus.Histogram
	delivery  prometheus.Histogram
	unsafe    *prometheus.GaugeVec
}

func newMetrics(registry prometheus.Registerer, circuitOpen, blind, postgresFailing, fuseBlown, stalled func() bool) *metrics {
	m := &metrics{
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "diehard_relay_events_total",
			Help: "Events that left the outbox, by result: delivered, dead_lettered.",
		}, []string{"result"}),
		batches: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "diehard_relay_batches_total",
			Help: "Attempts to deliver a batch, by result: settled, resolved, retried, token_renewed, split, released.",
		}, []string{"result"}),
		attempted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "diehard_relay_events_attempted_total",
			Help: "Events in all inserts, including failed inserts. The excess over delivered events is the cost of faults and refused events.",
		}),
		failed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "diehard_relay_events_stored_by_failed_inserts_total",
			Help: "Events that are present although their insert failed. Materialized views of the table may lack them.",
		}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "diehard_relay_errors_total",
			Help: "Failed attempts to deliver a batch, by the class of the error: " + strings.Join(errorClasses, ", ") + ".",
		}, []string{"class"}),
		rows: newHistogram("diehard_relay_batch_rows", "Events in each acknowledged insert.",
			prometheus.ExponentialBuckets(1, 4, 11)), // 1 to 1 million
		flush: newHistogram("diehard_relay_flush_seconds", "Duration of each insert into the sink, including failed inserts.",
			prometheus.ExponentialBuckets(0.005, 2, 18)), // 5 ms to 11 minutes
		delivery: newHistogram("diehard_relay_delivery_seconds", "Time from the publishing of each event to its acknowledgement by the sink.",
			prometheus.ExponentialBuckets(0.005, 2, 22)), // 5 ms to 3 hours
	}
	m.unsafe = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "diehard_relay_postgresql_unsafe",
		Help: "1 for each setting of PostgreSQL with which a crash can lose committed events.",
	}, []string{"setting"})
	for _, result := range []string{resultDelivered, resultDeadLettered} {
		m.events.WithLabelValues(result)
	}
	for _, result := range []string{
		resultSettled, resultResolved, resultRetried, resultTokenRenewed, resultSplit, resultReleased,
	} {
		m.batches.WithLabelValues(result)
	}
	for _, class := range errorClasses {
		m.errors.WithLabelValues(class)
	}
	registry.MustRegister(m.events, m.batches, m.attempted, m.failed, m.errors, m.rows, m.flush, m.delivery, m.unsafe,
		newFlag("diehard_relay_circuit_open",
			"1 if the circuit breaker is not closed: this relay inserts nothing because the sink fails.", circuitOpen),
		newFlag("diehard_relay_blind",
			"1 if a presence check cannot see all rows of the sink: batches with an unknown outcome wait for an operator.", blind),
		newFlag("diehard_relay_postgresql_failing",
			"1 if this relay delivers nothing because PostgreSQL is unavailable or lacks a property: see /readyz.", postgresFailing),
		newFlag("diehard_relay_fuse_blown",
			"1 if the fleet has reached its bound of dead letters: refused events wait in the outbox for an operator.", fuseBlown),
		newFlag("diehard_relay_stalled",
			"1 if an event is old and no relay works on it: see /readyz.", stalled))
	return m
}

// newHistogram returns a histogram with buckets, and with a native histogram for a server
// that scrapes it.
func newHistogram(name, help string, buckets []float64) prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: name, Help: help, Buckets: buckets,
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160,
	})
}

// newFlag returns a gauge that is 1 if isSet returns true, and otherwise 0.
func newFlag(name, help string, isSet func() bool) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return flag(isSet()) })
}

// setUnsafe sets the settings of the gauge unsafe.
func (m *metrics) setUnsafe(settings []string) {
	m.unsafe.Reset()
	for _, setting := range settings {
		m.unsafe.WithLabelValues(setting).Set(1)
	}
}

// observe records the delivery of events that were published at these times, in
// microseconds since 1970.
func (m *metrics) observe(published []int64, acknowledged time.Time) {
	now := acknowledged.UnixMicro()
	for _, at := range published {
		m.delivery.Observe(float64(max(0, now-at)) / 1e6)
	}
	m.events.WithLabelValues(resultDelivered).Add(float64(len(published)))
}

// The classes of errors, in addition to those of sinks.
const (
	classMisconfigured = "misconfigured"
	classNotChecked    = "not_checked"
	classPostgreSQL    = "postgresql"
)

// errorClasses are the values of the label class.
var errorClasses = []string{
	sink.Unavailable.String(), sink.Overloaded.String(), sink.TooLarge.String(), sink.Permanent.String(), sink.Unknown.String(),
	classMisconfigured, classPostgreSQL,
}

// errorClass returns the class of an error of the sink.
func errorClass(err error) string {
	_, misconfigured := errors.AsType[*sink.MisconfiguredError](err)
	_, blind := errors.AsType[*sink.BlindError](err)
	switch {
	case misconfigured, blind, errors.Is(err, errOtherDestination):
		return classMisconfigured
	case errors.Is(err, errNotChecked):
		return classNotChecked
	}
	return sink.ClassOf(err).String()
}

// relayCollector has the figures of this relay that change without an event to count.
type relayCollector struct {
	relay                            *Relay
	reason, turn, paused, late, busy *prometheus.Desc
}

func newRelayCollector(r *Relay) *relayCollector {
	return &relayCollector{
		relay: r,
		reason: prometheus.NewDesc("diehard_relay_circuit_reason",
			"1 for the class of the error that keeps the circuit breaker open.", []string{"class"}, nil),
		turn: prometheus.NewDesc("diehard_relay_loop_last_turn_timestamp_seconds",
			"Time of the last turn of each loop. The loop cut waits while the circuit breaker is open.", []string{"loop"}, nil),
		paused: prometheus.NewDesc("diehard_relay_paused",
			"1 if an operator has paused the fleet: see relay status.", nil, nil),
		late: prometheus.NewDesc("diehard_relay_late_commits_total",
			"Polls that have found an event that was committed after events with higher ids were cut.", nil, nil),
		busy: prometheus.NewDesc("diehard_relay_busy_workers",
			"Workers of this relay that deliver a batch.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (c *relayCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{c.reason, c.turn, c.paused, c.late, c.busy} {
		descs <- desc
	}
}

// Collect implements prometheus.Collector.
func (c *relayCollector) Collect(samples chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		samples <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	reason := ""
	if err := c.relay.circuit.err(); err != nil {
		reason = errorClass(err)
	}
	for _, class := range append(slices.Clone(errorClasses), classNotChecked) {
		gauge(c.reason, flag(class == reason), class)
	}
	for loop, turn := range c.relay.turns {
		if at := turn.Load(); at > 0 {
			gauge(c.turn, float64(at)/1e9, string(loop))
		}
	}
	gauge(c.paused, flag(c.relay.o.Store.Paused() != nil))
	gauge(c.busy, float64(c.relay.busy.Load()))
	samples <- prometheus.MustNewConstMetric(c.late, prometheus.CounterValue, float64(c.relay.o.Store.LateCommits()))
}

func flag(set bool) float64 {
	if set {
		return 1
	}
	return 0
}
