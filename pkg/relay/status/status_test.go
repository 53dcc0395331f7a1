package status_test

import (
	"errors"
	"os"
	"regexp"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/relay/status"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

func TestStatus(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "status")
}

var _ = Describe("The verdict", func() {
	relay := func(host, reason string) store.Member {
		return store.Member{Host: host, PID: 7, Settings: store.MemberSettings{"relay.linger": "250ms"}, State: store.MemberState{Ready: reason, Stopped: reason != ""}}
	}
	since := func(m store.Member, at time.Time) store.Member {
		m.State.Since = at
		return m
	}
	delivering := func(m store.Member) store.Member {
		m.State.Stopped = false
		return m
	}
	holding := func(m store.Member, horizon time.Duration) store.Member {
		m.State.HorizonSeconds = horizon.Seconds()
		return m
	}
	silent := func(m store.Member) store.Member {
		m.SilentSeconds = 90
		return m
	}
	waits := store.Stats{BacklogEvents: 1_234_567, OldestSeconds: 3 * 3600}
	at := time.Date(2026, 11, 24, 3, 12, 0, 0, time.UTC)

	DescribeTable("is one sentence", func(stats store.Stats, pause *store.Pause, fleet []store.Member, healthy bool, verdict string, advice ...string) {
		found := status.New(stats, pause, fleet)
		Expect(found.Verdict).To(Equal(verdict))
		Expect(found.Healthy).To(Equal(healthy))
		Expect(found.Advice).To(Equal(append([]string{}, advice...)))
	},
		Entry("of an idle fleet", store.Stats{}, nil, []store.Member{relay("a", "")}, true, "Delivering: no event waits."),
		Entry("of a busy fleet", store.Stats{BacklogEvents: 12, OldestSeconds: 0.08}, nil, []store.Member{relay("a", "")}, true,
			"Delivering: 12 events wait, the oldest for 80 ms."),
		Entry("of a backlog without a fault", waits, nil, []store.Member{relay("a", "")}, true,
			"Delivering, but behind: 1.2 million events wait, the oldest for 3 h.",
			"If the age grows, add relays, or look at the load of PostgreSQL and ClickHouse."),
		Entry("of events within the objective", store.Stats{BacklogEvents: 400, OldestSeconds: 40.96}, nil, []store.Member{relay("a", "")}, true,
			"Delivering: 400 events wait, the oldest for 40 s."),
		Entry("of events outside the objective", store.Stats{BacklogEvents: 400, OldestSeconds: 41}, nil, []store.Member{relay("a", "")}, true,
			"Delivering, but behind: 400 events wait, the oldest for 41 s.",
			"If the age grows, add relays, or look at the load of PostgreSQL and ClickHouse."),
		Entry("of a pause", waits, &store.Pause{At: at, By: "alice@laptop"}, []store.Member{relay("a", "")}, false,
			"Paused since 2026-11-24 03:12:00 UTC by alice@laptop: 1.2 million events wait, the oldest for 3 h. Nothing is lost.",
			"`relay resume` ends the pause."),
		Entry("without relays", store.Stats{BacklogEvents: 1, OldestSeconds: 5}, nil, nil, false,
			"No relay is running: 1 event waits for 5 s. Nothing is lost.",
			"Start relays. If they run, look for \"relay missing from fleet\" in their logs."),
		Entry("with silent relays only", store.Stats{}, nil, []store.Member{silent(relay("a", ""))}, false,
			"No relay is running: no event waits. Nothing is lost.",
			"Start relays. If they run, look for \"relay missing from fleet\" in their logs.",
			"The relay a/7 is silent for 1 min 30 s: it was killed or suspended, or cannot reach PostgreSQL."),
		Entry("of an outage", waits, nil, []store.Member{since(relay("a", "sink: clickhouse error 252: too many parts"), at.Add(time.Minute)), since(relay("b", "sink: clickhouse error 252: too many parts"), at)}, false,
			"Not delivering since 2026-11-24 03:12:00 UTC: sink: clickhouse error 252: too many parts; 1.2 million events wait, the oldest for 3 h. Nothing is lost.",
			"The relays continue without help after the cause is corrected."),
		Entry("of a session that blocks the outbox", waits, nil, []store.Member{relay("a", `stalled: event 7 is in no batch: session 32002 (application "report-tool", user "ada", idle in transaction) has locked the row of outbox_cursor`)}, false,
			`Not delivering: stalled: event 7 is in no batch: session 32002 (application "report-tool", user "ada", idle in transaction) has locked the row of outbox_cursor; 1.2 million events wait, the oldest for 3 h. Nothing is lost.`,
			"If nobody needs the session, end it: `SELECT pg_terminate_backend(32002)`.", "The relays continue without help after the cause is corrected."),
		Entry("of a session of another relay", store.Stats{}, nil, []store.Member{relay("a", `stalled: batch x waits: session 7 (application "diehard-relay", user "relay", active) has locked the row`)}, false,
			`Not delivering: stalled: batch x waits: session 7 (application "diehard-relay", user "relay", active) has locked the row; no event waits. Nothing is lost.`,
			"The relays continue without help after the cause is corrected."),
		Entry("of an outage with several causes", store.Stats{}, nil, []store.Member{relay("a", "one"), relay("b", "two")}, false,
			"Not delivering: one; no event waits. Nothing is lost.",
			"1 of 2 relays: two", "The relays continue without help after the cause is corrected."),
		Entry("of a relay with a fault", store.Stats{}, nil, []store.Member{relay("a", "sink: no route\nto host."), relay("b", "")}, false,
			"1 of 2 relays are not ready: sink: no route to host; no event waits.",
			"The relays continue without help after the cause is corrected."),
		Entry("of a fleet that delivers only some batches", waits, nil, []store.Member{delivering(relay("a", "no event becomes a dead letter")), relay("b", "sink: no route")}, false,
			"Delivering in part: no event becomes a dead letter; 1.2 million events wait, the oldest for 3 h. Nothing is lost.",
			"1 of 2 relays: sink: no route", "The relays continue without help after the cause is corrected."),
		Entry("of an old snapshot", store.Stats{}, nil, []store.Member{relay("a", ""), holding(relay("b", ""), 31*time.Minute)}, true,
			"Delivering: no event waits.",
			"A snapshot of PostgreSQL is open for 31 min. PostgreSQL keeps the rows of delivered events meanwhile."),
		Entry("of a snapshot that is not old", store.Stats{}, nil, []store.Member{holding(relay("b", ""), 30*time.Minute)}, true, "Delivering: no event waits."),
		Entry("of failing batches and dead letters", store.Stats{BacklogEvents: 10, OldestSeconds: 600, FailingBatches: 2, DeadLetters: 10_000}, nil,
			[]store.Member{relay("a", "")}, true,
			"Delivering, but 2 batches are failing: 10 events wait, the oldest for 10 min.",
			"2 batches are retried: `relay batches list --state failing` shows the errors.",
			"10,000 or more dead letters wait for your decision: `relay dead-letters list`."),
		Entry("of different configurations", store.Stats{}, nil, []store.Member{
			relay("a", ""), relay("b", ""), {Host: "c", Settings: store.MemberSettings{"relay.linger": "1s", "clickhouse.cluster": ""}},
		}, true, "Delivering: no event waits.",
			"The relays have different configurations: relay.linger is 250ms (2 relays), 1s (1 relay)."),
	)

	DescribeTable("names the section of the runbook", func(stats store.Stats, pause *store.Pause, fleet []store.Member, runbook string) {
		Expect(status.New(stats, pause, fleet).Runbook).To(Equal(runbook))
	},
		Entry("of nothing", store.Stats{}, nil, []store.Member{relay("a", "")}, ""),
		Entry("of a pause", store.Stats{DeadLetters: 1}, &store.Pause{At: at}, []store.Member{relay("a", "")}, "DiehardPaused"),
		Entry("of no relay", store.Stats{}, nil, nil, "DiehardNoRelay"),
		Entry("of an outage", store.Stats{}, nil, []store.Member{relay("a", "sink: no route")}, "DiehardNotDelivering"),
		Entry("of a relay with a fault", store.Stats{}, nil, []store.Member{relay("a", "sink: no route"), relay("b", "")}, "DiehardRelayImpaired"),
		Entry("of old events", waits, nil, []store.Member{relay("a", "")}, "DiehardEventsLate"),
		Entry("of failing batches", store.Stats{FailingBatches: 1, DeadLetters: 1}, nil, []store.Member{relay("a", "")}, "DiehardBatchesFailing"),
		Entry("of dead letters", store.Stats{DeadLetters: 1}, nil, []store.Member{relay("a", "")}, "DiehardDeadLetters"),
		Entry("of an old snapshot", store.Stats{}, nil, []store.Member{holding(relay("a", ""), time.Hour)}, "DiehardHorizonHeldBack"),
		Entry("of a silent relay", store.Stats{}, nil, []store.Member{relay("a", ""), silent(relay("b", ""))}, "DiehardRelayImpaired"),
		Entry("of silent relays only", store.Stats{}, nil, []store.Member{silent(relay("a", ""))}, "DiehardNoRelay"),
	)

	It("says that PostgreSQL is not available", func() {
		found := status.Unavailable(errors.New("no route\nto host"))
		Expect(found.Verdict).To(Equal("PostgreSQL is not available: no route to host. Committed events wait there. Nothing is lost."))
		Expect(found.Healthy).To(BeFalse())
		Expect(found.Runbook).To(Equal("DiehardPostgreSQLFailing"))
	})

	It("names sections that exist", func() {
		source, err := os.ReadFile("status.go")
		Expect(err).NotTo(HaveOccurred())
		runbook, err := os.ReadFile("../../../docs/runbook.md")
		Expect(err).NotTo(HaveOccurred())
		names := regexp.MustCompile(`"(Diehard[A-Za-z]+)"`).FindAllStringSubmatch(string(source), -1)
		Expect(names).NotTo(BeEmpty())
		for _, name := range names {
			Expect(string(runbook)).To(ContainSubstring("### " + name[1] + "\n"))
		}
	})
})

var _ = DescribeTable("Figures for people", func(got, want string) { Expect(got).To(Equal(want)) },
	Entry(nil, status.Count(999), "999"), Entry(nil, status.Count(9_999), "9,999"),
	Entry(nil, status.Count(999_999), "999,999"), Entry(nil, status.Count(1_250_000), "1.2 million"),
	Entry(nil, status.Duration(0), "0 ms"), Entry(nil, status.Duration(59*time.Second), "59 s"),
	Entry(nil, status.Duration(250*time.Second), "4 min 10 s"), Entry(nil, status.Duration(2*time.Hour), "2 h"),
	Entry(nil, status.Duration(53*time.Hour), "2 d 5 h"),
	Entry(nil, status.Bytes(999), "999 B"), Entry(nil, status.Bytes(999_960), "1.0 MB"), Entry(nil, status.Bytes(1<<40), "1.1 TB"),
)
