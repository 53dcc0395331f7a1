package clickhouse

import (
	"context"

	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Observe implements sink.Observer. On a cluster, the figures are those of the worst
// replica.
func (s *Sink) Observe(ctx context.Context) ([]sink.Figure, error) {
	parts, replicas := "system.parts", "system.replicas"
	if s.cluster != "" {
		parts = "clusterAllReplicas(" + quoteString(s.cluster) + ", system.parts)"
		replicas = "clusterAllReplicas(" + quoteString(s.cluster) + ", system.replicas)"
	}
	resolving, err := s.resolving(ctx)
	if err != nil {
		return nil, err
	}
	table := " WHERE database = currentDatabase() AND table = " + quoteString(s.name)
	var most uint64
	if err := s.conn.QueryRow(resolving, "SELECT max(parts) FROM (SELECT count() AS parts FROM "+parts+table+
		" AND active GROUP BY hostName(), partition_id)").Scan(&most); err != nil {
		return nil, s.classify(ctx, "count the parts of the table", err)
	}
	figures := make([]sink.Figure, 0, 2)
	figures = append(figures, sink.Figure{
		Name:  "diehard_clickhouse_partition_parts",
		Help:  "Active parts of the partition that has the most. ClickHouse refuses inserts at parts_to_throw_insert, 3,000 by default.",
		Value: float64(most),
	})
	if s.cluster == "" {
		return figures, nil
	}
	var queued uint64
	if err := s.conn.QueryRow(resolving, "SELECT toUInt64(max(inserts_in_queue)) FROM "+replicas+table).Scan(&queued); err != nil {
		return nil, s.classify(ctx, "read the queues of the replicas", err)
	}
	return append(figures, sink.Figure{
		Name:  "diehard_clickhouse_replica_inserts_in_queue",
		Help:  "Inserts that the slowest replica still has to fetch.",
		Value: float64(queued),
	}), nil
}

// Connections returns the open and the idle connections to ClickHouse.
func (s *Sink) Connections() (open, idle int) {
	for _, pool := range []driver.Conn{s.conn, s.inserts} {
		stats := pool.Stats()
		open, idle = open+stats.Open, idle+stats.Idle
	}
	return open, idle
}
