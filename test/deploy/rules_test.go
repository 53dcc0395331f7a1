package deploy_test

import (
	"fmt"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/chunks"
)

// now is the time of the evaluation.
var now = time.Date(2026, 11, 24, 3, 12, 0, 0, time.UTC)

// step is the time between two scrapes, and between two evaluations of the rules.
const step = time.Minute

// history is the time for which the server has scraped the fleet.
const history = 74 * time.Hour

const (
	mebibyte = 1 << 20
	day      = 24 * time.Hour
)

// values returns the sample of a time before now, or false if none exists.
type values func(ago time.Duration) (value, bool)

func gauge(n float64) values {
	return func(time.Duration) (value, bool) { return value{number: n}, true }
}

// since returns n from a time before now on, and 0 before it.
func since(begin time.Duration, n float64) values { return between(begin, 0, n) }

// between returns n in a period, and 0 otherwise.
func between(begin, end time.Duration, n float64) values {
	return func(ago time.Duration) (value, bool) {
		if ago > begin || ago < end {
			return value{}, true
		}
		return value{number: n}, true
	}
}

// rising returns a counter that rises by perSecond in a period.
func rising(perSecond float64, begin, end time.Duration) values {
	return func(ago time.Duration) (value, bool) {
		return value{number: perSecond * max(0, begin-max(ago, end)).Seconds()}, true
	}
}

func (v values) plus(other values) values {
	return func(ago time.Duration) (value, bool) {
		a, _ := v(ago)
		b, _ := other(ago)
		return value{number: a.number + b.number}, true
	}
}

// until returns the values up to a time before now. The series ends then.
func (v values) until(end time.Duration) values {
	return func(ago time.Duration) (value, bool) {
		if ago < end {
			return value{}, false
		}
		return v(ago)
	}
}

// simulated is the series of a simulated fleet.
type simulated struct {
	labels labels.Labels
	at     values
}

func (s simulated) name() labels.Labels { return s.labels }

func (s simulated) between(from, to time.Time) (samples []chunks.Sample) {
	for ago := min(history, now.Sub(from).Truncate(step)); ago >= 0 && !now.Add(-ago).After(to); ago -= step {
		if v, ok := s.at(ago); ok {
			samples = append(samples, sample{now.Add(-ago).UnixMilli(), v})
		}
	}
	return samples
}

// evaluating returns a server that has scraped the series.
func evaluating(scraped []simulated) *server {
	GinkgoHelper()
	all := make([]series, len(scraped))
	for i, s := range scraped {
		all[i] = s
	}
	return newServer(readRules(), step, func() []series { return all })
}

// change changes the series that have the name and the labels of the metric, or adds one.
type change struct {
	metric string
	to     func(before values) values
}

func set(metric string, to values) change {
	return change{metric, func(values) values { return to }}
}

func end(metric string, ago time.Duration) change {
	return change{metric, func(before values) values { return before.until(ago) }}
}

const eventsPerSecond = 100

// healthy are the series of two relays and an API that have no fault.
func healthy() (all []simulated) {
	for _, instance := range []string{"a", "b"} {
		for metric, to := range map[string]values{
			`diehard_outbox_backlog_events`:                                           gauge(20),
			`diehard_outbox_oldest_event_age_seconds`:                                 gauge(0.2),
			`diehard_outbox_backlog_bytes`:                                            gauge(100 * mebibyte),
			`diehard_outbox_oldest_batch_age_seconds{state="failing"}`:                gauge(0),
			`diehard_outbox_oldest_batch_age_seconds{state="in_flight"}`:              gauge(0.1),
			`diehard_outbox_oldest_batch_age_seconds{state="put_off"}`:                gauge(0),
			`diehard_outbox_oldest_batch_age_seconds{state="waiting"}`:                gauge(0.1),
			`diehard_relay_failing_batches`:                                           gauge(0),
			`diehard_relay_dead_letters`:                                              gauge(0),
			`diehard_relay_fleet_configurations`:                                      gauge(1),
			`diehard_relay_events_total{result="delivered"}`:                          rising(eventsPerSecond, history, 0),
			`diehard_relay_events_total{result="dead_lettered"}`:                      gauge(0),
			`diehard_relay_events_stored_by_failed_inserts_total`:                     gauge(0),
			`diehard_relay_delivery_seconds_bucket{le="40.96"}`:                       rising(eventsPerSecond, history, 0),
			`diehard_relay_delivery_seconds_count`:                                    rising(eventsPerSecond, history, 0),
			`diehard_relay_circuit_open`:                                              gauge(0),
			`diehard_relay_paused`:                                                    gauge(0),
			`diehard_relay_blind`:                                                     gauge(0),
			`diehard_relay_postgresql_failing`:                                        gauge(0),
			`diehard_relay_fuse_blown`:                                                gauge(0),
			`diehard_relay_stalled`:                                                   gauge(0),
			`diehard_relay_history_unverified`:                                        gauge(0),
			`diehard_postgresql_horizon_age_seconds`:                                  gauge(1),
			`diehard_relay_loop_last_turn_timestamp_seconds{loop="cut"}`:              turning,
			`diehard_relay_loop_last_turn_timestamp_seconds{loop="report"}`:           turning,
			`diehard_relay_housekeeping_last_success_timestamp_seconds{task="audit"}`: turning,
			`diehard_relay_housekeeping_runs_total{result="done",task="audit"}`:       rising(1.0/3600, history, 0),
			`diehard_relay_housekeeping_runs_total{result="failed",task="audit"}`:     gauge(0),
		} {
			all = append(all, newSeries(metric, to, "relay", instance))
		}
	}
	all = append(all, newSeries("diehard_outbox_backlog_limit_bytes", gauge(1000*mebibyte), "api", "c"))
	for status, perSecond := range map[string]float64{"201": 99, "503": 1} {
		all = append(all, newSeries(`diehard_http_request_seconds_count{status="`+status+`"}`, rising(perSecond, history, 0), "api", "c"))
	}
	return all
}

// turning is the time of a loop that has turned right before each scrape.
func turning(ago time.Duration) (value, bool) {
	return value{number: float64(now.Add(-ago).Unix())}, true
}

func newSeries(metric string, to values, job, instance string) simulated {
	GinkgoHelper()
	parsed, err := promQL.ParseMetric(metric)
	Expect(err).NotTo(HaveOccurred(), metric)
	builder := labels.NewBuilder(parsed)
	for name, text := range map[string]string{"job": job, "instance": instance} {
		if parsed.Get(name) == "" {
			builder.Set(name, text)
		}
	}
	return simulated{builder.Labels(), to}
}

// after returns the series after the changes.
func after(all []simulated, changes ...change) []simulated {
	GinkgoHelper()
	for _, c := range changes {
		wanted, err := promQL.ParseMetric(c.metric)
		Expect(err).NotTo(HaveOccurred(), c.metric)
		found := false
		for i, s := range all {
			same := true
			wanted.Range(func(l labels.Label) { same = same && s.labels.Get(l.Name) == l.Value })
			if same {
				found = true
				all[i].at = c.to(s.at)
			}
		}
		if !found {
			all = append(all, newSeries(c.metric, c.to(gauge(0)), "relay", "a"))
		}
	}
	return all
}

// oldEvents are waiting events of an age, since a time before now.
func oldEvents(begin time.Duration, age float64) []change {
	return []change{
		set("diehard_outbox_oldest_event_age_seconds", since(begin, age)),
		set(`diehard_outbox_oldest_batch_age_seconds{state="waiting"}`, since(begin, age)),
	}
}

// noDelivery ends the deliveries at a time before now.
func noDelivery(ago time.Duration) change {
	return set(`diehard_relay_events_total{result="delivered"}`, rising(eventsPerSecond, history, ago))
}

// late makes a share of the events late in a period.
func late(share float64, begin, end time.Duration) change {
	return set(`diehard_relay_delivery_seconds_bucket{le="40.96"}`,
		rising(eventsPerSecond, history, 0).plus(rising(-share*eventsPerSecond, begin, end)))
}

// lateNative is the same for a server that scrapes native histograms.
func lateNative(share float64, begin time.Duration) []change {
	native := func(ago time.Duration) (value, bool) {
		all, _ := rising(eventsPerSecond, history, 0)(ago)
		late, _ := rising(share*eventsPerSecond, begin, 0)(ago)
		return value{histogram: &histogram.FloatHistogram{ // the buckets (0.5, 1] and (64, 128]
			Schema: 0, Count: all.number, Sum: all.number, PositiveSpans: []histogram.Span{{Offset: 0, Length: 1}, {Offset: 6, Length: 1}},
			PositiveBuckets: []float64{all.number - late.number, late.number},
		}}, true
	}
	return []change{
		end("diehard_relay_delivery_seconds_bucket", history+step), end("diehard_relay_delivery_seconds_count", history+step),
		set("diehard_relay_delivery_seconds", native),
	}
}

func all(changes ...any) (flat []change) {
	for _, c := range changes {
		switch c := c.(type) {
		case change:
			flat = append(flat, c)
		case []change:
			flat = append(flat, c...)
		}
	}
	return flat
}

// figuresOfTheOutboxEnd ends the series that are absent while PostgreSQL is unavailable.
func figuresOfTheOutboxEnd(ago time.Duration) (changes []change) {
	for _, name := range []string{
		"backlog_events", "backlog_bytes", "oldest_event_age_seconds", "oldest_batch_age_seconds",
	} {
		changes = append(changes, end("diehard_outbox_"+name, ago))
	}
	for _, name := range []string{"failing_batches", "dead_letters", "fleet_configurations"} {
		changes = append(changes, end("diehard_relay_"+name, ago))
	}
	return changes
}

// relaysEnd ends all series of relays.
func relaysEnd(ago time.Duration, instances ...string) (changes []change) {
	for _, instance := range instances {
		changes = append(changes, end(`{instance="`+instance+`"}`, ago))
	}
	return changes
}

// A ruleCase changes the series of a healthy fleet. The alert fires or not, and exactly the
// alerts in also fire in addition.
type ruleCase struct {
	alert   string
	fires   bool
	title   string
	changes []change
	also    []string
}

const (
	fires = true
	quiet = false
)

var cases = []ruleCase{
	{"DiehardNotDelivering", fires, "events wait, and none is delivered", all(oldEvents(10*time.Minute, 300), noDelivery(10*time.Minute)), nil},
	{"DiehardNotDelivering", fires, "all relays report a stall", all(set("diehard_relay_stalled", since(4*time.Minute, 1))), nil},
	{"DiehardNotDelivering", quiet, "no event waits", all(noDelivery(time.Hour), set("diehard_outbox_oldest_event_age_seconds", gauge(0))), nil},
	{"DiehardNotDelivering", quiet, "the outage is short", all(oldEvents(6*time.Minute, 300), noDelivery(6*time.Minute)), nil},
	{
		"DiehardNotDelivering", quiet, "an operator has paused the fleet",
		all(oldEvents(30*time.Minute, 1800), noDelivery(30*time.Minute), set("diehard_relay_paused", since(30*time.Minute, 1))), nil,
	},
	{"DiehardNotDelivering", quiet, "only a failing batch waits", all(noDelivery(20*time.Minute), set("diehard_relay_failing_batches", since(20*time.Minute, 1)),
		set("diehard_outbox_oldest_event_age_seconds", since(20*time.Minute, 1200)),
		set(`diehard_outbox_oldest_batch_age_seconds{state="failing"}`, since(20*time.Minute, 1200))), nil},
	{"DiehardNotDelivering", fires, "other batches wait next to a failing batch", all(oldEvents(20*time.Minute, 1200), noDelivery(20*time.Minute),
		set("diehard_relay_failing_batches", since(20*time.Minute, 1))), nil},

	{
		"DiehardPostgreSQLFailing", fires, "PostgreSQL is unavailable",
		all(set("diehard_relay_postgresql_failing", since(4*time.Minute, 1)), figuresOfTheOutboxEnd(4*time.Minute), noDelivery(4*time.Minute),
			set("diehard_relay_stalled", since(3*time.Minute, 1))), nil,
	},
	{"DiehardPostgreSQLFailing", quiet, "PostgreSQL has just failed", all(set("diehard_relay_postgresql_failing", since(2*time.Minute, 1))), nil},
	{
		"DiehardPostgreSQLFailing", quiet, "the fleet is paused",
		all(set("diehard_relay_postgresql_failing", since(10*time.Minute, 1)), set("diehard_relay_paused", since(30*time.Minute, 1))), nil,
	},
	{"DiehardPostgreSQLFailing", quiet, "one relay cannot reach PostgreSQL", all(set(`diehard_relay_postgresql_failing{instance="a"}`, since(10*time.Minute, 1))), nil},

	{"DiehardNoRelay", fires, "all relays have gone", all(relaysEnd(15*time.Minute, "a", "b")), nil},
	{"DiehardNoRelay", fires, "no relay was ever scraped", all(relaysEnd(history+step, "a", "b")), nil},
	{
		"DiehardNoRelay", fires, "the relays of another outbox are still there",
		all(relaysEnd(15*time.Minute, "a", "b"), set(`diehard_relay_circuit_open{job="other"}`, gauge(0))), nil,
	},
	{"DiehardNoRelay", quiet, "the relays are restarting", all(relaysEnd(8*time.Minute, "a", "b")), nil},
	{"DiehardNoRelay", quiet, "one of two relays has gone", all(relaysEnd(15*time.Minute, "a")), nil},

	{"DiehardEventsLate", fires, "the relays are behind", all(oldEvents(12*time.Minute, 50)), nil},
	{"DiehardEventsLate", quiet, "the relays are within the objective", all(oldEvents(12*time.Minute, 40)), nil},
	{"DiehardEventsLate", quiet, "a pause has just begun", all(oldEvents(12*time.Minute, 50), set("diehard_relay_paused", since(time.Minute, 1))), nil},
	{"DiehardEventsLate", quiet, "the relays catch up soon", all(oldEvents(8*time.Minute, 50)), nil},

	{"DiehardObjectiveBurnsFast", fires, "5 % are late for half an hour", all(late(0.05, 30*time.Minute, 0)), nil},
	{"DiehardObjectiveBurnsFast", fires, "1 % is late for six hours", all(late(0.01, 6*time.Hour, 0)), nil},
	{"DiehardObjectiveBurnsFast", fires, "5 % are late, in native histograms", lateNative(0.05, 30*time.Minute), nil},
	{"DiehardObjectiveBurnsFast", quiet, "no event is late, in native histograms", lateNative(0, 30*time.Minute), nil},
	{"DiehardObjectiveBurnsFast", fires, "no event of the last 5 minutes is late, but many of the last half hour", all(late(0.1, 36*time.Minute, 6*time.Minute)), nil},
	{"DiehardObjectiveBurnsFast", quiet, "all events of a minute are late", all(late(1, time.Minute, 0)), nil},
	{"DiehardObjectiveBurnsFast", quiet, "the cause has gone", all(late(0.05, 40*time.Minute, 10*time.Minute)), nil},
	{"DiehardObjectiveBurnsFast", quiet, "nine events are late", all(
		set(`diehard_relay_events_total{result="delivered"}`, rising(1.0/120, history, 0)),
		set("diehard_relay_delivery_seconds_count", rising(1.0/120, history, 0)),
		set(`diehard_relay_delivery_seconds_bucket{le="40.96"}`, rising(1.0/120, history, 28*time.Minute).plus(rising(1.0/120, 19*time.Minute, 0)))), nil},
	{
		"DiehardObjectiveBurnsFast", quiet, "the fleet was paused",
		all(late(0.05, 30*time.Minute, 0), set("diehard_relay_paused", between(40*time.Minute, 30*time.Minute, 1))), nil,
	},

	{"DiehardObjectiveBurnsSlowly", fires, "0.5 % are late for twenty hours", all(late(0.005, 20*time.Hour, 0)), nil},
	{"DiehardObjectiveBurnsSlowly", fires, "0.2 % are late for two days", all(late(0.002, 2*day, 0)), nil},
	{"DiehardObjectiveBurnsSlowly", quiet, "many events are late for ten minutes", all(late(0.5, 10*time.Minute, 0)), []string{"DiehardObjectiveBurnsFast"}},
	{"DiehardObjectiveBurnsSlowly", quiet, "0.05 % are late", all(late(0.0005, 3*day, 0)), nil},

	{"DiehardPaused", fires, "the pause lasts", all(set("diehard_relay_paused", since(61*time.Minute, 1))), nil},
	{"DiehardPaused", quiet, "the pause is short", all(set("diehard_relay_paused", since(50*time.Minute, 1))), nil},

	{"DiehardFuseBlown", fires, "the fuse has blown", all(set("diehard_relay_fuse_blown", since(3*time.Minute, 1))), nil},
	{"DiehardFuseBlown", quiet, "it has just begun", all(set("diehard_relay_fuse_blown", since(time.Minute, 1))), nil},
	{"DiehardFuseBlown", quiet, "the fuse was mended", all(set("diehard_relay_fuse_blown", between(30*time.Minute, time.Minute, 1))), nil},

	{"DiehardDeadLetters", fires, "one dead letter waits", all(set("diehard_relay_dead_letters", since(6*time.Minute, 1))), nil},
	{"DiehardDeadLetters", quiet, "it has just begun", all(set("diehard_relay_dead_letters", since(4*time.Minute, 1))), nil},
	{"DiehardDeadLetters", quiet, "the dead letter was retried", all(set("diehard_relay_dead_letters", between(6*time.Minute, time.Minute, 1))), nil},

	{"DiehardBatchesFailing", fires, "a batch fails for long", all(set("diehard_relay_failing_batches", since(31*time.Minute, 1))), nil},
	{"DiehardBatchesFailing", quiet, "the event becomes a dead letter soon", all(set("diehard_relay_failing_batches", since(20*time.Minute, 1))), nil},

	{"DiehardBlind", fires, "a row policy hides rows", all(set(`diehard_relay_blind{instance="a"}`, since(11*time.Minute, 1))), nil},
	{"DiehardBlind", quiet, "it has just begun", all(set("diehard_relay_blind", since(9*time.Minute, 1))), nil},
	{"DiehardBlind", quiet, "the policy was corrected", all(set(`diehard_relay_blind{instance="a"}`, between(30*time.Minute, time.Minute, 1))), nil},

	{"DiehardHistoryUnverified", fires, "events stay unverified", all(set("diehard_relay_history_unverified", since(16*time.Minute, 1))), nil},
	{"DiehardHistoryUnverified", quiet, "it has just begun", all(set("diehard_relay_history_unverified", since(14*time.Minute, 1))), nil},
	{"DiehardHistoryUnverified", quiet, "the relays verify them soon", all(set("diehard_relay_history_unverified", between(20*time.Minute, 5*time.Minute, 1))), nil},

	{
		"DiehardViewsMayLackEvents", fires, "an insert failed after its rows were stored",
		all(set(`diehard_relay_events_stored_by_failed_inserts_total{instance="a"}`, since(20*time.Minute, 3))), nil,
	},
	{"DiehardViewsMayLackEvents", quiet, "it was yesterday", all(set(`diehard_relay_events_stored_by_failed_inserts_total{instance="a"}`, since(day, 3))), nil},

	{"DiehardCircuitOpen", fires, "the circuit breaker of one relay is open", all(set(`diehard_relay_circuit_open{instance="b"}`, since(16*time.Minute, 1))), nil},
	{"DiehardCircuitOpen", quiet, "it closes soon", all(set("diehard_relay_circuit_open", between(16*time.Minute, 5*time.Minute, 1))), nil},

	{"DiehardRelayImpaired", fires, "one relay cannot reach PostgreSQL", all(set(`diehard_relay_postgresql_failing{instance="a"}`, since(16*time.Minute, 1))), nil},
	{"DiehardRelayImpaired", fires, "one relay reports a stall", all(set(`diehard_relay_stalled{instance="a"}`, since(16*time.Minute, 1))), nil},
	{"DiehardRelayImpaired", quiet, "it has just begun", all(set(`diehard_relay_stalled{instance="a"}`, since(14*time.Minute, 1))), nil},
	{"DiehardRelayImpaired", quiet, "PostgreSQL is unavailable", all(set("diehard_relay_postgresql_failing", since(20*time.Minute, 1))), []string{"DiehardPostgreSQLFailing"}},
	{"DiehardRelayImpaired", quiet, "all relays report a stall", all(set("diehard_relay_stalled", since(20*time.Minute, 1))), []string{"DiehardNotDelivering"}},

	{"DiehardLoopHangs", fires, "a loop does not turn", all(set(`diehard_relay_loop_last_turn_timestamp_seconds{instance="a",loop="report"}`, gauge(float64(now.Add(-10*time.Minute).Unix())))), nil},
	{"DiehardLoopHangs", fires, "the loop cut does not turn", all(set(`diehard_relay_loop_last_turn_timestamp_seconds{instance="a",loop="cut"}`, gauge(float64(now.Add(-15*time.Minute).Unix())))), nil},
	{"DiehardLoopHangs", quiet, "it has just begun", all(set(`diehard_relay_loop_last_turn_timestamp_seconds{instance="a",loop="report"}`, gauge(float64(now.Add(-4*time.Minute).Unix())))), nil},
	{"DiehardLoopHangs", quiet, "a vacuum takes minutes", all(set(`diehard_relay_loop_last_turn_timestamp_seconds{loop="tidy"}`, gauge(float64(now.Add(-10*time.Minute).Unix())))), nil},
	{"DiehardLoopHangs", quiet, "the loop cut waits for ClickHouse", all(
		set(`diehard_relay_loop_last_turn_timestamp_seconds{loop="cut"}`, gauge(float64(now.Add(-14*time.Minute).Unix()))),
		set("diehard_relay_circuit_open", since(14*time.Minute, 1))), nil},

	{"DiehardMixedConfiguration", fires, "two configurations stay", all(set("diehard_relay_fleet_configurations", since(61*time.Minute, 2))), nil},
	{"DiehardMixedConfiguration", quiet, "a deployment is rolling", all(set("diehard_relay_fleet_configurations", since(30*time.Minute, 2))), nil},

	{
		"DiehardHousekeepingStuck", fires, "a task has not run since yesterday",
		all(set("diehard_relay_housekeeping_last_success_timestamp_seconds", gauge(float64(now.Add(-7*time.Hour).Unix())))), nil,
	},
	{"DiehardHousekeepingStuck", fires, "every run of a task fails", all(
		set(`diehard_relay_housekeeping_runs_total{result="failed"}`, rising(1.0/600, time.Hour, 0)),
		set(`diehard_relay_housekeeping_runs_total{result="done"}`, rising(1.0/600, history, 3*time.Hour))), nil},
	{"DiehardHousekeepingStuck", quiet, "it has just begun", all(set("diehard_relay_housekeeping_last_success_timestamp_seconds", gauge(float64(now.Add(-370*time.Minute).Unix())))), nil},
	{"DiehardHousekeepingStuck", quiet, "no run was due", all(set(`diehard_relay_housekeeping_runs_total{result="done"}`, rising(1.0/600, history, 3*time.Hour))), nil},
	{"DiehardHousekeepingStuck", quiet, "one run has failed", all(set(`diehard_relay_housekeeping_runs_total{result="failed"}`, since(30*time.Minute, 1))), nil},
	{"DiehardHousekeepingStuck", quiet, "no vacuum was due", all(
		set(`diehard_relay_housekeeping_last_success_timestamp_seconds{task="vacuum"}`, gauge(float64(now.Add(-7*time.Hour).Unix())))), nil},

	{"DiehardOutboxAlmostFull", fires, "the outbox has 95 % of its limit", all(set("diehard_outbox_backlog_bytes", gauge(950*mebibyte))), nil},
	{"DiehardOutboxAlmostFull", fires, "the outbox grows fast", all(set("diehard_outbox_backlog_bytes", gauge(100*mebibyte).plus(rising(mebibyte/20, 90*time.Minute, 0)))), nil},
	{"DiehardOutboxAlmostFull", quiet, "it has just begun", all(set("diehard_outbox_backlog_bytes", gauge(800*mebibyte).plus(since(9*time.Minute, 150*mebibyte)))), nil},
	{"DiehardOutboxAlmostFull", quiet, "the outbox is large, but does not grow", all(set("diehard_outbox_backlog_bytes", gauge(800*mebibyte))), nil},
	{"DiehardOutboxAlmostFull", fires, "the API refuses events", all(set(`diehard_outbox_full{job="api"}`, since(11*time.Minute, 1))), nil},
	{"DiehardOutboxAlmostFull", quiet, "no limit is configured", all(end("diehard_outbox_backlog_limit_bytes", history+step),
		set("diehard_outbox_backlog_bytes", gauge(100*mebibyte).plus(rising(mebibyte, 90*time.Minute, 0)))), nil},

	{
		"DiehardOutboxFilling", fires, "the outbox reaches its limit in two days",
		all(set("diehard_outbox_backlog_bytes", gauge(100*mebibyte).plus(rising(800.0*mebibyte/(2*86400), 8*time.Hour, 0)))), nil,
	},
	{
		"DiehardOutboxFilling", quiet, "the outbox reaches its limit in five days",
		all(set("diehard_outbox_backlog_bytes", gauge(100*mebibyte).plus(rising(900.0*mebibyte/(5*86400), 8*time.Hour, 0)))), nil,
	},

	{"DiehardHorizonHeldBack", fires, "a transaction is open for long", all(set("diehard_postgresql_horizon_age_seconds", since(12*time.Minute, 2000))), nil},
	{"DiehardHorizonHeldBack", quiet, "it has just begun", all(set("diehard_postgresql_horizon_age_seconds", since(9*time.Minute, 2000))), nil},
	{"DiehardHorizonHeldBack", quiet, "a transaction is open for a while", all(set("diehard_postgresql_horizon_age_seconds", since(12*time.Minute, 1700))), nil},

	{"DiehardPostgreSQLUnsafe", fires, "fsync is off", all(set(`diehard_relay_postgresql_unsafe{setting="fsync"}`, since(6*time.Minute, 1))), nil},
	{"DiehardPostgreSQLUnsafe", quiet, "it has just begun", all(set(`diehard_relay_postgresql_unsafe{setting="fsync"}`, since(4*time.Minute, 1))), nil},
	{"DiehardPostgreSQLUnsafe", quiet, "fsync is on again", all(set(`diehard_relay_postgresql_unsafe{setting="fsync"}`, between(day, time.Minute, 1))), nil},

	{
		"DiehardAPIErrors", fires, "a tenth of the requests fail",
		all(set(`diehard_http_request_seconds_count{status="503"}`, rising(1, history, 0).plus(rising(10, 15*time.Minute, 0)))), nil,
	},
	{"DiehardAPIErrors", quiet, "it has just begun", all(set(`diehard_http_request_seconds_count{status="503"}`, rising(1, history, 0).plus(rising(50, 3*time.Minute, 0)))), nil},
	{"DiehardAPIErrors", quiet, "one of a hundred requests fails", nil, nil},
	{"DiehardAPIErrors", quiet, "clients send invalid requests", all(set(`diehard_http_request_seconds_count{job="api",status="422"}`, rising(100, history, 0))), nil},
}

var _ = Describe("The alerts", func() {
	for _, c := range cases {
		verb := map[bool]string{fires: "fires", quiet: "does not fire"}[c.fires]
		It(fmt.Sprintf("%s %s if %s", c.alert, verb, c.title), func(ctx SpecContext) {
			expected := slices.Clone(c.also)
			if c.fires {
				expected = append(expected, c.alert)
			}
			var names []string
			for _, firing := range evaluating(after(healthy(), c.changes...)).alerts(ctx, now) {
				names = append(names, firing.name)
				Expect(firing.summary + firing.description).NotTo(Or(ContainSubstring("<no value>"), ContainSubstring("{{"), ContainSubstring("%!")))
			}
			slices.Sort(names)
			Expect(slices.Compact(names)).To(ConsistOf(expected))
		})
	}

	It("have a case in which they fire, and a case in which they do not", func() {
		for _, rule := range readRules() {
			for _, fires := range []bool{true, false} {
				Expect(rule.Alert == "" || slices.ContainsFunc(cases, func(c ruleCase) bool { return c.alert == rule.Alert && c.fires == fires })).To(
					BeTrue(), "%s, fires: %t", rule.Alert, fires)
			}
		}
	})
})
