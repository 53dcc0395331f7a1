package integration_test

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("An operator", func() {
	var s *system.System

	BeforeEach(func(ctx SpecContext) { s = newSystem(ctx) })

	// command runs a command of the relay that reaches only PostgreSQL.
	command := func(code int, args ...string) string {
		GinkgoHelper()
		p := programs.Run(suite.Prepared(), "relay", args, deadLetterEnv(s.PostgresDSN)...)
		p.EndsWith(code)
		return string(p.Out.Contents()) + string(p.Err.Contents())
	}
	status := func(code int) (status map[string]any) {
		GinkgoHelper()
		Expect(json.Unmarshal([]byte(command(code, "status", "--json")), &status)).To(Succeed())
		return status
	}
	// onlyBatch returns the only batch that waits, or nil.
	onlyBatch := func() (batch map[string]any) {
		GinkgoHelper()
		if listed := command(0, "batches", "list", "--json"); listed != "" {
			Expect(json.Unmarshal([]byte(listed), &batch)).To(Succeed())
		}
		return batch
	}

	It("sees the fleet, pauses it and resumes it", func(ctx SpecContext) {
		Expect(command(1, "status")).To(HavePrefix("No relay is running: no event waits. Nothing is lost.\n- Start relays."))
		relay := s.Relay(s.ClickHouse.Native)
		Eventually(ctx, func() (ready bool, err error) {
			return ready, s.Postgres.GetContext(ctx, &ready, "SELECT bool_and(NOT state ? 'ready') FROM outbox_relays")
		}).WithTimeout(system.Patience).Should(BeTrue())
		Expect(command(0, "status")).To(And(
			HavePrefix("Delivering: no event waits.\n"), MatchRegexp(`\n\S+/\d+ +\S+ +\S.* of 2 busy +ready\n$`)))

		Expect(command(0, "pause")).To(Equal("paused\n"))
		Expect(command(0, "pause")).To(HavePrefix("paused already, since "))
		Expect(s.Publish(ctx, system.Events(5)...)).To(Succeed())
		found := status(1)
		Expect(found).To(And(HaveKeyWithValue("healthy", false), HaveKeyWithValue("backlog_events", 5.0),
			HaveKeyWithValue("verdict", MatchRegexp(`^Paused since .* by \S+@\S+: 5 events wait, the oldest for .*\. Nothing is lost\.$`))))
		Eventually(func() string { return metrics(relay) }).WithTimeout(system.Patience).Should(ContainSubstring("diehard_relay_paused 1\n"))

		Expect(command(0, "resume")).To(Equal("resumed\n"))
		s.ExpectDelivered(ctx, 5)
		Expect(command(0, "resume")).To(Equal("the fleet is not paused\n"))
		var audited []string
		Expect(s.Postgres.SelectContext(ctx, &audited, "SELECT action FROM outbox_audit ORDER BY id")).To(Succeed())
		Expect(audited).To(Equal([]string{"pause", "resume"}))

		By("stopping the relay")
		relay.Stop()
		Expect(command(1, "status")).To(HavePrefix("No relay is running"))
	})

	It("retries a batch that waits for an outage's end", func(ctx SpecContext) {
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log ADD CONSTRAINT failing CHECK throwIf(event_type = 'thing_happened') = 0")
		relay := s.Relay(s.ClickHouse.Native, "DIEHARD_RELAY_BACKOFF_MIN=1m", "DIEHARD_RELAY_BACKOFF_MAX=1h", "DIEHARD_RELAY_LINGER=1ms")
		Expect(s.Publish(ctx, system.Events(1)...)).To(Succeed())
		Eventually(func() any { return onlyBatch()["state"] }).WithTimeout(system.Patience).Should(Equal("failing"))
		id, _ := onlyBatch()["batch_id"].(string)
		Eventually(func() any { return onlyBatch()["next_attempt_at"] }).WithTimeout(system.Patience).ShouldNot(BeNil())
		Expect(command(0, "batches", "list", "--state", "failing")).To(And(HavePrefix("BATCH ID"), ContainSubstring(id), ContainSubstring("clickhouse error 395")))
		Expect(command(0, "batches", "list", "--state", "put_off")).To(Equal("no batches\n"))
		Expect(command(0, "batches", "show", id)).To(And(ContainSubstring("state "), ContainSubstring("{[1,2)}")))
		Expect(command(0, "status")).To(ContainSubstring("- 1 batch is retried: `relay batches list --state failing` shows the errors.\n"))
		Expect(command(1, "batches", "split", id)).To(HaveSuffix("split the batch: it has one event\n"))

		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log DROP CONSTRAINT failing")
		Expect(command(0, "batches", "retry", id)).To(Equal("retried " + id + "\n"))
		s.ExpectDelivered(ctx, 1)
		Expect(command(1, "batches", "retry", id)).To(Equal("relay: batch " + id + " not found: it may have been delivered\n"))
		relay.Stop()
	})

	It("bounds the bytes that wait, without an effect on users", func(ctx SpecContext) {
		api := s.API("DIEHARD_OUTBOX_MAX_BACKLOG_BYTES=1KiB")
		Expect(s.Publish(ctx, system.Events(50)...)).To(Succeed())
		post := func(path string, body map[string]any) int {
			response, err := system.Post(ctx, api.URL()+path, body)
			Expect(err).NotTo(HaveOccurred())
			return response.Status
		}
		event := map[string]any{"event_type": "thing_happened", "event_context": map[string]any{}}
		Eventually(func() int { return post("/v1/events", event) }).WithTimeout(system.Patience).Should(Equal(503))
		Expect(api.Metric("diehard_outbox_full")).To(Equal(1.0))
		Expect(post("/v1/users", map[string]any{"email": "ada@example.com"})).To(Equal(201))
	})

	DescribeTable("gets a usage error", func(text string, args ...string) {
		Expect(command(2, args...)).To(Equal("relay: " + text + "\n"))
	},
		Entry(nil, `--state is "lost", must be one of waiting, in_flight, failing, put_off`, "batches", "list", "--state", "lost"),
		Entry(nil, "--limit is 0, must be from 1 to 10000", "batches", "list", "--limit", "0"),
		Entry(nil, "retry requires an id, as list shows it", "batches", "retry"),
		Entry(nil, `invalid id "7": an id is a UUID, as list shows it`, "batches", "show", "7"),
	)

	It("gets metrics that follow Prometheus' conventions", func(ctx SpecContext) {
		relay := s.Relay(s.ClickHouse.Native)
		Expect(s.Publish(ctx, system.Events(1)...)).To(Succeed())
		s.ExpectDelivered(ctx, 1)
		Eventually(func() string { return metrics(relay) }).WithTimeout(system.Patience).Should(And(
			ContainSubstring("diehard_clickhouse_partition_parts 1\n"), ContainSubstring("diehard_relay_fleet_members 1\n"),
			ContainSubstring("diehard_relay_fleet_configurations 1\n"), ContainSubstring("diehard_relay_listening 1\n"),
			MatchRegexp(`diehard_relay_loop_last_turn_timestamp_seconds\{loop="cut"\} 1\.\d+e\+09\n`),
			ContainSubstring(`diehard_outbox_batches{state="waiting"} 0`), MatchRegexp(`diehard_outbox_size_bytes [1-9]`)))
		api := s.API()
		Expect(problems(metrics(relay))).To(BeEmpty())
		Expect(problems(metrics(api))).To(BeEmpty())

		By("comparing them with the documentation")
		page, err := os.ReadFile("../../docs/metrics.md")
		Expect(err).NotTo(HaveOccurred())
		var documented []string
		for _, match := range regexp.MustCompile("(?m)^\\| `(diehard_[a-z_]+)`").FindAllStringSubmatch(string(page), -1) {
			documented = append(documented, match[1])
		}
		Expect(documented).To(HaveEach(HavePrefix("diehard_")))
		exported := regexp.MustCompile(`(?m)^# TYPE (diehard_[a-z_]+) `)
		for _, match := range exported.FindAllStringSubmatch(metrics(relay)+metrics(api), -1) {
			Expect(documented).To(ContainElement(match[1]))
		}
		exceptions := []string{ // exported only with a cluster, a sample or a fault
			"diehard_clickhouse_replica_inserts_in_queue", "diehard_relay_dead_letters_by_type",
			"diehard_outbox_backlog_limit_bytes", "diehard_outbox_full",
			"diehard_relay_housekeeping_runs_total", "diehard_relay_housekeeping_deleted_rows_total",
			"diehard_relay_housekeeping_last_success_timestamp_seconds", "diehard_http_key_requests_total", "diehard_http_request_seconds", "diehard_http_shed_requests_total",
		}
		for _, name := range documented {
			if !slices.Contains(exceptions, name) {
				Expect(metrics(relay) + metrics(api)).To(ContainSubstring("# TYPE " + name + " "))
			}
		}
	})
})

func metrics(p *programs.Process) string {
	GinkgoHelper()
	body, err := p.Metrics()
	Expect(err).NotTo(HaveOccurred())
	return body
}

// problems returns the problems that Prometheus' linter finds in Diehard's own metrics.
func problems(metrics string) (own []promlint.Problem) {
	GinkgoHelper()
	all, err := promlint.New(strings.NewReader(metrics)).Lint()
	Expect(err).NotTo(HaveOccurred())
	for _, problem := range all {
		if strings.HasPrefix(problem.Metric, "diehard_") {
			own = append(own, problem)
		}
	}
	return own
}
