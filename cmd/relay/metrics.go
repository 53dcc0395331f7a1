package main

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

// registerConnections registers the metrics of the connections.
func registerConnections(registry prometheus.Registerer, sink *clickhouse.Sink, listening *atomic.Bool) {
	gauge := func(name, help string, labels prometheus.Labels, value func() int) {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels},
			func() float64 { return float64(value()) }))
	}
	gauge("diehard_relay_listening", "1 if PostgreSQL notifies this relay of new events. Otherwise it polls.", nil, func() int {
		if listening.Load() {
			return 1
		}
		return 0
	})
	const name, help = "diehard_clickhouse_connections", "Connections to ClickHouse, by state: busy, idle."
	gauge(name, help, prometheus.Labels{"state": "busy"}, func() int { open, idle := sink.Connections(); return open - idle })
	gauge(name, help, prometheus.Labels{"state": "idle"}, func() int { _, idle := sink.Connections(); return idle })
}
