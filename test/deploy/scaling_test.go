package deploy_test

import (
	"fmt"
	"math"
	"os"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// scalingQueries returns the queries by which the Helm chart lets KEDA scale the relays.
func scalingQueries() map[string]string {
	GinkgoHelper()
	queries := map[string]string{}
	for _, name := range []string{"age", "backlog"} {
		text, err := os.ReadFile("../../deploy/helm/diehard/files/relay-" + name + ".promql")
		Expect(err).NotTo(HaveOccurred())
		Expect(string(text)).To(ContainSubstring("SELECTOR"))
		queries[name] = strings.ReplaceAll(string(text), "SELECTOR", `job="relay"`)
	}
	return queries
}

var _ = Describe("The queries for KEDA", func() {
	late := []change{
		set("diehard_outbox_oldest_event_age_seconds", gauge(90)),
		set(`diehard_outbox_oldest_batch_age_seconds{state="waiting"}`, gauge(90)),
		set("diehard_outbox_backlog_events", gauge(5_000_000)),
	}

	DescribeTable("return the age and the backlog that more relays could reduce",
		func(ctx SpecContext, age, backlog float64, changes ...change) {
			server := evaluating(after(healthy(), changes...))
			queries := scalingQueries()
			Expect(server.query(ctx, queries["age"], now)).To(ConsistOf(HaveField("F", age)))
			Expect(server.query(ctx, queries["backlog"], now)).To(ConsistOf(HaveField("F", backlog)))
		},
		Entry("a healthy fleet", 0.2, 20.0),
		Entry("a late fleet", 90.0, 5_000_000.0, late[0], late[1], late[2]),
		Entry("one relay cannot insert", 90.0, 5_000_000.0, late[0], late[1], late[2], set(`diehard_relay_circuit_open{instance="a"}`, gauge(1))),
		Entry("no relay can insert", 0.0, 0.0, late[0], late[1], late[2], set("diehard_relay_circuit_open", gauge(1))),
		Entry("the fleet is paused", 0.0, 0.0, late[0], late[1], late[2], set("diehard_relay_paused", gauge(1))),
		Entry("only failing events are old", 0.1, 20.0, late[0], set("diehard_relay_failing_batches", gauge(2)),
			set(`diehard_outbox_oldest_batch_age_seconds{state="failing"}`, gauge(90))),
		Entry("other events are old too", 90.0, 5_000_000.0, late[0], late[1], late[2], set("diehard_relay_failing_batches", gauge(2))),
		Entry("PostgreSQL is unavailable", 0.0, 0.0, end("diehard_outbox_oldest_event_age_seconds", 10*time.Minute),
			end("diehard_outbox_oldest_batch_age_seconds", 10*time.Minute), end("diehard_outbox_backlog_events", 10*time.Minute)),
		Entry("another fleet is late", 0.2, 20.0, set(`diehard_outbox_oldest_event_age_seconds{job="other"}`, gauge(900)),
			set(`diehard_outbox_backlog_events{job="other"}`, gauge(math.MaxInt32))),
	)

	It("use metrics and labels of docs/metrics.md", func() {
		metrics := readMetrics()
		for name, query := range scalingQueries() {
			for metric, selected := range metricNames(query) {
				for _, label := range selected {
					Expect(metrics.labelsOf(metric)).To(ContainElement(label), fmt.Sprintf("%s in %s", metric, name))
				}
			}
		}
	})
})
