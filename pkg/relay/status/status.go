// Package status tells an operator in one sentence what the fleet of relays does, whether
// something is wrong, since when, and what to do. It reads PostgreSQL only.
package status

import (
	"cmp"
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// Status is the state of the outbox and of its relays.
type Status struct {
	// Verdict is one sentence. Healthy is false if an operator has to act, or if nothing is
	// delivered.
	Verdict string `json:"verdict"`
	Healthy bool   `json:"healthy"`
	// Advice has what to do, and what else is worth knowing.
	Advice []string `json:"advice"`
	// Runbook is the section of docs/runbook.md that explains the verdict or the first
	// advice, which is the name of an alert. It is empty if nothing is to be done.
	Runbook string `json:"runbook,omitempty"`

	BacklogEvents    int64   `json:"backlog_events"`
	OldestAgeSeconds float64 `json:"oldest_event_age_seconds"`
	BacklogBytes     int64   `json:"backlog_bytes"`
	SizeBytes        int64   `json:"size_bytes"`
	// Batches has the figures of the batches by their state.
	Batches        map[store.BatchState]store.BatchStats `json:"batches"`
	FailingBatches int64                                 `json:"failing_batches"`
	// DeadLetters is exact below 10,000. 10,000 means 10,000 or more.
	DeadLetters int64          `json:"dead_letters"`
	Paused      *store.Pause   `json:"paused"`
	Relays      []store.Member `json:"relays"`
}

// countTime bounds the time for which Read counts a large backlog.
const countTime = 2 * time.Second

// Read reads the state of the outbox and of its relays.
func Read(ctx context.Context, s *store.Store) (Status, error) {
	stats, err := s.Stats(ctx)
	if err != nil {
		return Status{}, err
	}
	// The count does nothing if Stats has counted everything.
	for began, more := time.Now(), true; more && time.Since(began) < countTime; {
		if more, err = s.CountBacklog(ctx); err != nil {
			return Status{}, err
		}
		if stats, err = s.Stats(ctx); err != nil {
			return Status{}, err
		}
	}
	pause, err := s.ReadPause(ctx)
	if err != nil {
		return Status{}, err
	}
	fleet, err := s.Fleet(ctx)
	if err != nil {
		return Status{}, err
	}
	return New(stats, pause, fleet), nil
}

// New returns the status of these figures.
func New(stats store.Stats, pause *store.Pause, fleet []store.Member) Status {
	status := Status{
		BacklogEvents: stats.BacklogEvents, OldestAgeSeconds: stats.OldestSeconds, BacklogBytes: stats.BacklogBytes, SizeBytes: stats.SizeBytes,
		Batches: map[store.BatchState]store.BatchStats{}, FailingBatches: stats.FailingBatches,
		DeadLetters: stats.DeadLetters, Paused: pause, Relays: fleet, Advice: []string{},
	}
	for _, state := range store.BatchStates() {
		status.Batches[state] = stats.Batches[state]
	}
	status.judge()
	return status
}

// behind is the age of the oldest event from which a fleet without a fault is behind. It is
// the objective of docs/runbook.md, and the age of the alert DiehardEventsLate.
const behind = 40_960 * time.Millisecond

// heldBack is the age of a snapshot of PostgreSQL from which it is worth an advice.
const heldBack = 30 * time.Minute

// Unavailable returns the status if PostgreSQL cannot be read.
func Unavailable(err error) Status {
	return Status{
		Verdict: fmt.Sprintf("PostgreSQL is not available: %s. Committed events wait there. Nothing is lost.", oneLine(err.Error())),
		Advice:  []string{"Publishers fail too. The relays continue without help after the cause is corrected."},
		Runbook: "DiehardPostgreSQLFailing",
	}
}

func (s *Status) judge() {
	running := store.Running(s.Relays)
	delivering, ready := 0, 0
	reasons := map[string][]store.Member{}
	var order []string
	for _, relay := range running {
		if !relay.State.Stopped {
			delivering++
		}
		reason := relay.State.Ready
		if reason == "" {
			ready++
			continue
		}
		if reasons[reason] == nil {
			order = append(order, reason)
		}
		reasons[reason] = append(reasons[reason], relay)
	}
	switch {
	case s.Paused != nil:
		s.Verdict = fmt.Sprintf("Paused since %s by %s: %s. Nothing is lost.", At(s.Paused.At), s.Paused.By, s.waiting())
		s.advise("DiehardPaused", "`relay resume` ends the pause.")
	case len(running) == 0:
		s.Verdict = fmt.Sprintf("No relay is running: %s. Nothing is lost.", s.waiting())
		s.advise("DiehardNoRelay", "Start relays. If they run, look for \"relay missing from fleet\" in their logs.")
	case delivering == 0:
		first := reasons[order[0]]
		s.Verdict = fmt.Sprintf("Not delivering%s: %s; %s. Nothing is lost.", since(first), oneLine(order[0]), s.waiting())
		s.adviseRelays("DiehardNotDelivering", order, reasons, len(running))
	case ready == 0:
		s.Verdict = fmt.Sprintf("Delivering in part: %s; %s. Nothing is lost.", oneLine(order[0]), s.waiting())
		s.adviseRelays("DiehardRelayImpaired", order, reasons, len(running))
	case ready < len(running):
		s.Verdict = fmt.Sprintf("%d of %s not ready%s: %s; %s.", len(running)-ready, plural(len(running), "relay is", "relays are"),
			since(reasons[order[0]]), oneLine(order[0]), s.waiting())
		s.adviseRelays("DiehardRelayImpaired", order, reasons, len(running))
	case s.FailingBatches > 0:
		s.Healthy = true
		s.Verdict = fmt.Sprintf("Delivering, but %s failing: %s.", plural(int(s.FailingBatches), "batch is", "batches are"), s.waiting())
	case seconds(s.OldestAgeSeconds) > behind:
		s.Healthy = true
		s.Verdict = fmt.Sprintf("Delivering, but behind: %s.", s.waiting())
		s.advise("DiehardEventsLate", "If the age grows, add relays, or look at the load of PostgreSQL and ClickHouse.")
	default:
		s.Healthy = true
		s.Verdict = fmt.Sprintf("Delivering: %s.", s.waiting())
	}
	if s.FailingBatches > 0 {
		s.advise("DiehardBatchesFailing", plural(int(s.FailingBatches), "batch is", "batches are")+
			" retried: `relay batches list --state failing` shows the errors.")
	}
	if s.DeadLetters > 0 {
		s.advise("DiehardDeadLetters", atLeast(s.DeadLetters, "dead letter waits", "dead letters wait")+
			" for your decision: `relay dead-letters list`.")
	}
	if configurations := store.Configurations(running); len(configurations) > 1 {
		s.advise("DiehardMixedConfiguration", "The relays have different configurations: "+strings.Join(Differences(configurations), "; ")+".")
	}
	horizon := 0.0
	for _, relay := range running {
		horizon = max(horizon, relay.State.HorizonSeconds)
	}
	if seconds(horizon) > heldBack {
		s.advise("DiehardHorizonHeldBack", fmt.Sprintf("A snapshot of PostgreSQL is open for %s. PostgreSQL keeps the rows of delivered events meanwhile.",
			Duration(seconds(horizon))))
	}
	silent := "DiehardNoRelay"
	if len(running) > 0 {
		silent = "DiehardRelayImpaired"
	}
	for _, relay := range s.Relays {
		if relay.IsSilent() {
			s.advise(silent, fmt.Sprintf("The relay %s is silent for %s: it was killed or suspended, or cannot reach PostgreSQL.",
				Name(relay), Duration(seconds(relay.SilentSeconds))))
		}
	}
}

// advise adds an advice. The section of the first advice is the status' Runbook.
func (s *Status) advise(runbook, text string) {
	s.Advice = append(s.Advice, text)
	s.Runbook = cmp.Or(s.Runbook, runbook)
}

// adviseRelays adds the reasons that the verdict does not have.
func (s *Status) adviseRelays(runbook string, order []string, reasons map[string][]store.Member, running int) {
	for _, reason := range order[1:] {
		s.advise(runbook, fmt.Sprintf("%d of %s: %s", len(reasons[reason]), plural(running, "relay", "relays"), oneLine(reason)))
	}
	for _, reason := range order {
		if session := blockingSession.FindStringSubmatch(reason); len(session) == 3 && session[2] != relaySession {
			s.advise(runbook, fmt.Sprintf("If nobody needs the session, end it: `SELECT pg_terminate_backend(%s)`.", session[1]))
			break
		}
	}
	s.advise(runbook, "The relays continue without help after the cause is corrected.")
}

// blockingSession finds the session that a stall names.
var blockingSession = regexp.MustCompile(`^.*stalled: .*\bsession (\d+) \(application "([^"]*)"`)

// relaySession is the application name of relays. Their sessions end by themselves.
const relaySession = "diehard-relay"

// since returns the time since when the first of the relays has an open circuit breaker.
func since(relays []store.Member) string {
	var first time.Time
	for _, relay := range relays {
		if at := relay.State.Since; !at.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	if first.IsZero() {
		return ""
	}
	return " since " + At(first)
}

func (s *Status) waiting() string {
	if s.BacklogEvents == 0 {
		return "no event waits"
	}
	age := Duration(seconds(s.OldestAgeSeconds))
	if s.BacklogEvents == 1 {
		return "1 event waits for " + age
	}
	return fmt.Sprintf("%s events wait, the oldest for %s", Count(s.BacklogEvents), age)
}

// Differences returns the settings that differ between the configurations, with the number
// of relays for each value.
func Differences(configurations [][]store.Member) (texts []string) {
	for _, key := range differingKeys(configurations) {
		counts := map[string]int{}
		var values []string
		for _, group := range configurations {
			value := group[0].Settings[key]
			if counts[value] == 0 {
				values = append(values, value)
			}
			counts[value] += len(group)
		}
		for i, value := range values {
			values[i] = fmt.Sprintf("%s (%s)", orEmpty(value), plural(counts[value], "relay", "relays"))
		}
		texts = append(texts, key+" is "+strings.Join(values, ", "))
	}
	return texts
}

// Name returns the name of a relay for operators.
func Name(relay store.Member) string { return fmt.Sprintf("%s/%d", relay.Host, relay.PID) }
