package relay

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
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
		rows: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "diehard_relay_batch_rows",
			Help:    "Events in each acknowledged insert.",
			Buckets: prometheus.ExponentialBuckets(1, 4, 11),
		}),
		flush: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "diehard_relay_flush_seconds",
			Help:    "Duration of each insert into the sink, including failed inserts.",
			Buckets: prometheus.ExponentialBuckets(0.005, 2, 14),
		}),
		delivery: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "diehard_relay_delivery_seconds",
			Help:    "Time from the publishing of each event to its acknowledgement by the sink.",
			Buckets: prometheus.ExponentialBuckets(0.005, 2, 20),
		}),
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
	registry.MustRegister(m.events, m.batches, m.attempted, m.failed, m.rows, m.flush, m.delivery, m.unsafe,
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

// newFlag returns a gauge that is 1 if isSet returns true, and otherwise 0.
func newFlag(name, help string, isSet func() bool) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
		if isSet() {
			return 1
		}
		return 0
	})
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

// outboxCollector reads the outbox's figures at each scrape, within statsTimeout. The
// cost does not grow with the outbox.
type outboxCollector struct {
	store                                      *store.Store
	backlog, age, batches, failing, deadLetter *prometheus.Desc
}

const statsTimeout = 2 * time.Second

func newOutboxCollector(s *store.Store) *outboxCollector {
	return &outboxCollector{
		store: s,
		backlog: prometheus.NewDesc("diehard_outbox_backlog_events",
			"Events in the outbox. An estimate if more than 10,000 are not in a batch yet.", nil, nil),
		age: prometheus.NewDesc("diehard_outbox_oldest_event_age_seconds",
			"Age of the oldest event in the outbox, 0 if it is empty.", nil, nil),
		batches: prometheus.NewDesc("diehard_outbox_batches",
			"Batches of the whole fleet that wait or are being delivered.", nil, nil),
		failing: prometheus.NewDesc("diehard_relay_failing_batches",
			"Batches of the whole fleet whose data may have caused a failed attempt. They are retried.", nil, nil),
		deadLetter: prometheus.NewDesc("diehard_relay_dead_letters",
			"Events that the sink refused, kept for the operator. 10,000 means 10,000 or more.", nil, nil),
	}
}

// Describe implements prometheus.Collector.
func (c *outboxCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{c.backlog, c.age, c.batches, c.failing, c.deadLetter} {
		descs <- desc
	}
}

// Collect implements prometheus.Collector. If PostgreSQL is unavailable, it returns no
// figures, because outdated figures would mislead.
func (c *outboxCollector) Collect(samples chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), statsTimeout)
	defer cancel()
	stats, err := c.store.Stats(ctx)
	if err != nil {
		return
	}
	gauge := func(desc *prometheus.Desc, value float64) {
		samples <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value)
	}
	gauge(c.backlog, float64(stats.BacklogEvents))
	gauge(c.age, stats.OldestSeconds)
	gauge(c.batches, float64(stats.Batches))
	gauge(c.failing, float64(stats.FailingBatches))
	gauge(c.deadLetter, float64(stats.DeadLetters))
}
