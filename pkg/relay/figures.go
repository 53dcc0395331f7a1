package relay

import (
	"context"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// outboxCollector reads the outbox's figures at each scrape, within statsTimeout. The
// cost does not grow with the outbox.
type outboxCollector struct {
	store *store.Store
	tasks []store.Task // of the housekeeping that this relay takes part in

	backlog, bytes, unverified, age, size, batches, batchAge, failing *prometheus.Desc
	deadLetters, deadLetterTypes                                      *prometheus.Desc
	members, configurations, success                                  *prometheus.Desc
}

const statsTimeout = 2 * time.Second

// typedDeadLetters is the number of dead letters that are counted by type.
const typedDeadLetters = 1_000

// otherTypes is the label of all event types beyond the 20 most frequent.
const otherTypes = "(other)"

func newOutboxCollector(s *store.Store, tasks []store.Task) *outboxCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	return &outboxCollector{
		store: s,
		tasks: tasks,
		backlog: desc("diehard_outbox_backlog_events",
			"Events in the outbox. If 10,000 or more are not in a batch yet, an estimate, which is within 5 % after 30 seconds."),
		bytes: desc("diehard_outbox_backlog_bytes",
			"Estimated bytes of the events in the outbox, at most the size of the table."),
		unverified: desc("diehard_relay_history_unverified",
			"1 if waiting events are from before the last change of PostgreSQL's history."),
		age: desc("diehard_outbox_oldest_event_age_seconds",
			"Age of the oldest event in the outbox, 0 if it is empty."),
		size: desc("diehard_outbox_size_bytes",
			"Size of the table outbox_events with its indexes, including dead rows."),
		batches: desc("diehard_outbox_batches",
			"Batches of the whole fleet, by state: waiting, in_flight, failing, put_off.", "state"),
		batchAge: desc("diehard_outbox_oldest_batch_age_seconds",
			"Age of the first event of the oldest batch in each state, 0 if no batch is in the state.", "state"),
		failing: desc("diehard_relay_failing_batches",
			"Batches of the whole fleet whose data may have caused a failed attempt. They are retried."),
		deadLetters: desc("diehard_relay_dead_letters",
			"Events that the sink refused, kept for the operator. 10,000 means 10,000 or more."),
		deadLetterTypes: desc("diehard_relay_dead_letters_by_type",
			"The newest 1,000 dead letters, by the 20 most frequent event types and \"(other)\".", "event_type"),
		members: desc("diehard_relay_fleet_members",
			"Relays of the fleet that have reported themselves in the last minute."),
		configurations: desc("diehard_relay_fleet_configurations",
			"Different configurations in the fleet. More than 1: see relay status."),
		success: desc("diehard_relay_housekeeping_last_success_timestamp_seconds",
			"Time of the fleet's last success of each task of the housekeeping.", "task"),
	}
}

// Describe implements prometheus.Collector.
func (c *outboxCollector) Describe(descs chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{
		c.backlog, c.bytes, c.unverified, c.age, c.size, c.batches, c.batchAge, c.failing, c.deadLetters, c.deadLetterTypes, c.members, c.configurations, c.success,
	} {
		descs <- desc
	}
}

// Collect implements prometheus.Collector. If PostgreSQL is unavailable, it returns no
// figures, because outdated figures would mislead.
func (c *outboxCollector) Collect(samples chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), statsTimeout)
	defer cancel()
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		samples <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	if members, err := c.store.Fleet(ctx); err == nil {
		running := store.Running(members)
		gauge(c.members, float64(len(running)))
		gauge(c.configurations, float64(len(store.Configurations(running))))
	}
	if successes, err := c.store.TaskSuccesses(ctx); err == nil {
		for task, at := range successes {
			if slices.Contains(c.tasks, task) {
				gauge(c.success, float64(at.UnixMilli())/1000, string(task))
			}
		}
	}
	stats, err := c.store.Stats(ctx)
	if err != nil {
		return
	}
	gauge(c.backlog, float64(stats.BacklogEvents))
	gauge(c.bytes, float64(stats.BacklogBytes))
	gauge(c.unverified, flag(stats.Unverified))
	gauge(c.age, stats.OldestSeconds)
	gauge(c.size, float64(stats.SizeBytes))
	for _, state := range store.BatchStates() {
		gauge(c.batches, float64(stats.Batches[state].Batches), string(state))
		gauge(c.batchAge, stats.Batches[state].OldestSeconds, string(state))
	}
	gauge(c.failing, float64(stats.FailingBatches))
	gauge(c.deadLetters, float64(stats.DeadLetters))
	others := min(stats.DeadLetters, typedDeadLetters)
	for eventType, n := range stats.DeadLetterTypes {
		gauge(c.deadLetterTypes, float64(n), eventType)
		others -= n
	}
	if others > 0 {
		gauge(c.deadLetterTypes, float64(others), otherTypes)
	}
}
