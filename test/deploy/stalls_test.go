package deploy_test

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"html"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gexec"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

const (
	// stallsEnv has the duration of the load. The stalls begin after a tenth and end after
	// nine tenths of it. A shorter load than stallsLoad ends before the alerts fire.
	stallsEnv  = "DIEHARD_STALLS_DURATION"
	stallsLoad = 10 * time.Minute
	// afterLoad is the time after the load in which the alerts end, except for those in
	// lasting. The other windows of the rules have up to five minutes.
	afterLoad = 6 * time.Minute
	// interval is the interval of the groups of rules.
	interval = 30 * time.Second
	// noticed is the time after which the page shows a stall or its end. A relay counts as
	// silent after a minute, and a failed insert is repeated after up to half a minute.
	noticed = 2 * time.Minute
	// perSecond is the rate of events of each outbox.
	perSecond = 10
	// slow is the duration of an insert into a slow ClickHouse. It is longer than the linger
	// and shorter than relay.flush_timeout.
	slow = 25 * time.Second
)

// stall is an outbox with its own programs, and a fault in the middle of the load.
type stall struct {
	*system.System

	name       string
	clickHouse string // DSN for the relays, if they use a proxy
	relayCount int    // 0 is 1
	begin, end func(ctx context.Context)
	// during has the alerts that fire, with the longest time from the beginning of the stall.
	// A stall that is shorter than this time need not fire the alert.
	during map[string]time.Duration
	// after has the alerts that fire, with the longest time from the end of the stall.
	after map[string]time.Duration
	// may has the alerts that chance decides.
	may []string
	// verdict is a regular expression for the verdict and the advice of the page during the
	// stall.
	verdict string
	// read returns the verdict and the advice, separated by line breaks.
	read func(ctx context.Context) (string, error)

	relays []*programs.Process
	url    string // of the API
	admin  string // the operators' port of the last relay
	mu     sync.Mutex
	ids    []string // of the events that the API has published
	failed int      // requests without a positive response

	fired    map[string][2]time.Time // the first and the last evaluation at which each alert fires
	shown    []shown
	problems []string
}

// shown is a text of the page, with the times at which it appeared and was seen last.
type shown struct {
	text        string
	first, last time.Time
}

// The alerts of a stall that makes events late. Prometheus has no samples from before this
// run, so these events have the weight of days, and burnsSlowly fires in a run that is long
// enough.
const (
	burns       = "DiehardObjectiveBurnsFast"
	burnsSlowly = "DiehardObjectiveBurnsSlowly"
)

// lasting are the alerts with windows of half an hour and longer. They may fire until the end
// of the run.
var lasting = []string{burns, burnsSlowly, "DiehardViewsMayLackEvents"}

// stalls returns the kinds of stalls. Each kind has its own outbox, and all kinds run at the
// same time. A kind that breaks a server has its own server.
func stalls(ctx context.Context, e *servers) []*stall {
	GinkgoHelper()
	return []*stall{
		clickHouseDead(ctx, e),
		clickHouseSlow(ctx, e),
		insertsHang(ctx, e),
		clickHouseReadOnly(ctx, e),
		tooManyParts(ctx, e),
		postgresRestarted(ctx, e),
		postgresDown(ctx, e),
		badEvent(ctx, e),
		oneRelaySuspended(ctx, e),
		onlyRelaySuspended(ctx, e),
		snapshotHeld(ctx, e),
	}
}

func clickHouseDead(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	fragile := startClickHouse(ctx)
	return &stall{
		name: "clickhouse dead", System: e.system(ctx, e.postgres, fragile), relayCount: 2,
		begin:   func(context.Context) { Expect(fragile.Kill()).To(Succeed()) },
		end:     func(ctx context.Context) { Expect(fragile.Start(ctx)).To(Succeed()) },
		during:  map[string]time.Duration{"DiehardNotDelivering": 6 * time.Minute},
		after:   map[string]time.Duration{burns: 4 * time.Minute},
		verdict: `^Not delivering since .* UTC: sink: .*connection refused; [\d,]+ events wait, the oldest for .*\. Nothing is lost\.`,
	}
}

// clickHouseSlow makes events late, but no event waits longer than two inserts.
func clickHouseSlow(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	s := e.system(ctx, e.postgres, e.clickHouse)
	gateway, through := faults.StartGatewayTo(s.ClickHouse.HTTP)
	return &stall{
		name: "clickhouse slow", System: s, clickHouse: through,
		begin: func(context.Context) {
			gateway.Before(func(statement string) {
				if strings.HasPrefix(statement, "INSERT") {
					<-time.After(slow)
				}
			})
		},
		end:     func(context.Context) { gateway.Before(nil) },
		during:  map[string]time.Duration{burns: 6 * time.Minute},
		verdict: `^Delivering(, but behind)?: [\d,]+ events wait, the oldest for \d+ s\.`,
	}
}

// insertsHang makes every insert take longer than relay.flush_timeout. ClickHouse gets the
// inserts at the end of the stall, after the relay has given them up.
func insertsHang(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	s := e.system(ctx, e.postgres, e.clickHouse)
	proxy, through := faults.StartProxyTo(s.ClickHouse.HTTP)
	return &stall{
		name: "inserts hang", System: s, clickHouse: through,
		begin:   func(context.Context) { proxy.HoldFrom(faults.Requests, "INSERT") },
		end:     func(context.Context) { proxy.Release() },
		during:  map[string]time.Duration{"DiehardNotDelivering": 6 * time.Minute},
		after:   map[string]time.Duration{burns: 4 * time.Minute},
		may:     []string{"DiehardViewsMayLackEvents"},
		verdict: `^Not delivering since .* UTC: sink: unavailable: .*no response within 30s \(relay\.flush_timeout\); [\d,]+ events wait, the oldest for .*\. Nothing is lost\.`,
	}
}

func clickHouseReadOnly(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	s := e.system(ctx, e.postgres, e.clickHouse)
	gateway, through := faults.StartGatewayTo(s.ClickHouse.HTTP)
	return &stall{
		name: "clickhouse read-only", System: s, clickHouse: through,
		begin:   func(context.Context) { gateway.Impose("readonly=1") },
		end:     func(context.Context) { gateway.Impose("") },
		during:  map[string]time.Duration{"DiehardNotDelivering": 6 * time.Minute},
		after:   map[string]time.Duration{burns: 4 * time.Minute},
		verdict: `^Not delivering since .* UTC: sink: .*read-only.*; [\d,]+ events wait, the oldest for .*\. Nothing is lost\.`,
	}
}

func tooManyParts(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	s := e.system(ctx, e.postgres, e.clickHouse)
	return &stall{
		name: "too many parts", System: s,
		begin: func(ctx context.Context) {
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log MODIFY SETTING parts_to_throw_insert = 1")
		},
		end: func(ctx context.Context) {
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log RESET SETTING parts_to_throw_insert")
		},
		during:  map[string]time.Duration{"DiehardNotDelivering": 6 * time.Minute},
		after:   map[string]time.Duration{burns: 4 * time.Minute},
		verdict: `^Not delivering since .* UTC: sink: .*TOO_MANY_PARTS.*; [\d,]+ events wait, the oldest for .*\. Nothing is lost\.`,
	}
}

// postgresRestarted restarts PostgreSQL once. No alert fires, because it takes seconds.
func postgresRestarted(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	fragile := startPostgres(ctx)
	return &stall{
		name: "postgresql restarted", System: e.system(ctx, fragile, e.clickHouse),
		begin: func(ctx context.Context) {
			Expect(fragile.Kill()).To(Succeed())
			Expect(fragile.Start(ctx)).To(Succeed())
		},
		end:     func(context.Context) {},
		verdict: `^Delivering: .*\.$`,
	}
}

func postgresDown(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	fragile := startPostgres(ctx)
	return &stall{
		name: "postgresql down", System: e.system(ctx, fragile, e.clickHouse), relayCount: 2,
		begin:   func(context.Context) { Expect(fragile.Kill()).To(Succeed()) },
		end:     func(ctx context.Context) { Expect(fragile.Start(ctx)).To(Succeed()) },
		during:  map[string]time.Duration{"DiehardPostgreSQLFailing": 5 * time.Minute, "DiehardAPIErrors": 7 * time.Minute},
		verdict: `^PostgreSQL is not available: .*connection refused\. Committed events wait there\. Nothing is lost\.`,
	}
}

// badEvent publishes an event that violates a constraint. At the end, an operator drops the
// constraint and retries the event.
func badEvent(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	s := e.system(ctx, e.postgres, e.clickHouse)
	st := &stall{
		name: "bad event", System: s,
		during:  map[string]time.Duration{"DiehardDeadLetters": 7 * time.Minute},
		verdict: "^Delivering: .*\\.\n1 dead letter waits for your decision: relay dead-letters list\\.\nRunbook: DiehardDeadLetters$",
	}
	st.begin = func(ctx context.Context) {
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log ADD CONSTRAINT good CHECK event_type != 'refund_requested'")
		st.publish(ctx, "refund_requested")
	}
	st.end = func(ctx context.Context) {
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log DROP CONSTRAINT good")
		e.run(st, "dead-letters", "retry", "--all", "--yes").Ended()
	}
	return st
}

// oneRelaySuspended suspends one of two relays. The other relay delivers, so no alert need
// fire. If the suspended relay holds a batch or the cursor, some events are late.
func oneRelaySuspended(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	st := &stall{
		name: "one of two relays suspended", System: e.system(ctx, e.postgres, e.clickHouse), relayCount: 2,
		may:     []string{burns},
		verdict: "^Delivering: .*\\.\nThe relay .* is silent for .*: it was killed or suspended, or cannot reach PostgreSQL\\.\nRunbook: DiehardRelayImpaired$",
	}
	st.suspend()
	return st
}

// onlyRelaySuspended suspends the only relay. Its page does not respond.
func onlyRelaySuspended(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	st := &stall{
		name: "the only relay suspended", System: e.system(ctx, e.postgres, e.clickHouse),
		during:  map[string]time.Duration{"DiehardNoRelay": 7 * time.Minute},
		after:   map[string]time.Duration{burns: 4 * time.Minute},
		verdict: "^No relay is running: [\\d,]+ events wait, the oldest for .*\\. Nothing is lost\\.\n- Start relays\\. ",
	}
	st.suspend()
	st.read = func(context.Context) (string, error) {
		command := e.run(st, "status")
		Eventually(command.Session, programs.Patience).Should(gexec.Exit())
		command.Kill() // the exit code depends on the state
		verdict, _, _ := strings.Cut(string(command.Out.Contents()), "\n\n")
		return verdict, nil
	}
	return st
}

// snapshotHeld keeps a snapshot of PostgreSQL open. DiehardHorizonHeldBack fires after 40
// minutes, so it fires only in a longer run.
func snapshotHeld(ctx context.Context, e *servers) *stall {
	GinkgoHelper()
	s := e.system(ctx, e.postgres, e.clickHouse)
	var session *sqlx.Tx
	return &stall{
		name: "snapshot held", System: s,
		begin: func(ctx context.Context) {
			var err error
			session, err = testengines.OpenPostgres(s.PostgresDSN, nil).BeginTxx(context.WithoutCancel(ctx), &sql.TxOptions{Isolation: sql.LevelRepeatableRead})
			Expect(err).NotTo(HaveOccurred())
			_, err = session.ExecContext(ctx, "SELECT count(*) FROM outbox_events")
			Expect(err).NotTo(HaveOccurred())
		},
		end:     func(context.Context) { Expect(session.Rollback()).To(Succeed()) },
		during:  map[string]time.Duration{"DiehardHorizonHeldBack": 42 * time.Minute},
		verdict: `^Delivering: .*\.(\nA snapshot of PostgreSQL is open for .*)?`,
	}
}

// suspend suspends the first relay during the stall.
func (s *stall) suspend() {
	s.begin = func(context.Context) {
		s.relays[0].Signal(syscall.SIGSTOP)
		DeferCleanup(func() { s.relays[0].Signal(syscall.SIGCONT) }) // otherwise it would not end
	}
	s.end = func(context.Context) { s.relays[0].Signal(syscall.SIGCONT) }
}

// servers are the servers and programs of the outboxes.
type servers struct {
	programs   string
	postgres   *devstack.Postgres
	clickHouse *devstack.ClickHouse
	databases  int
}

func startPostgres(ctx context.Context) *devstack.Postgres {
	GinkgoHelper()
	server, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Durable: true, Settings: map[string]string{"max_connections": "500"}})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(server.Stop)
	return server
}

func startClickHouse(ctx context.Context) *devstack.ClickHouse {
	GinkgoHelper()
	server, err := devstack.StartClickHouse(ctx, devstack.ClickHouseOptions{})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(server.Stop)
	return server
}

// system returns a system with new databases on the servers.
func (e *servers) system(ctx context.Context, p *devstack.Postgres, c *devstack.ClickHouse) *system.System {
	GinkgoHelper()
	e.databases++
	name := fmt.Sprint("diehard_", e.databases)
	dsn, err := p.CreateDatabase(ctx, name)
	Expect(err).NotTo(HaveOccurred())
	log := slog.New(slog.DiscardHandler)
	db, err := postgres.Open(postgres.Options{DSN: dsn})
	Expect(err).NotTo(HaveOccurred())
	Expect(testengines.Schema.Migrate(ctx, db.DB, log)).To(Succeed())
	Expect(db.Close()).To(Succeed())
	Expect(c.CreateDatabase(ctx, name)).To(Succeed())
	dsns := testengines.ClickHouseDSNs{Native: c.NativeDSN(name), HTTP: c.HTTPDSN(name)}
	Expect(clickhouse.Migrate(ctx, clickhouse.Options{DSN: dsns.Native}, log)).To(Succeed())
	system.KeepDuplicates(ctx, dsns)
	return system.New(e.programs, dsn, dsns)
}

// run runs a command of the relay.
func (e *servers) run(s *stall, args ...string) *programs.Process {
	GinkgoHelper()
	return programs.Run(e.programs, "relay", args, "DIEHARD_POSTGRES_DSN="+s.PostgresDSN, "DIEHARD_CLICKHOUSE_DSN="+s.ClickHouse.Native, "DIEHARD_LOG_LEVEL=warn")
}

// start starts the programs.
func (s *stall) start(scraping context.Context, m *memory, group *errgroup.Group) {
	GinkgoHelper()
	s.fired = map[string][2]time.Time{}
	api := s.API()
	s.url = api.URL()
	env := []string{
		"DIEHARD_RELAY_BACKOFF_MIN=500ms", "DIEHARD_RELAY_BACKOFF_MAX=30s", // the defaults, which system.LaunchRelay changes
		"DIEHARD_RELAY_LINGER=1s", // fewer inserts, because all outboxes share the machine
	}
	for range max(s.relayCount, 1) {
		s.relays = append(s.relays, s.Relay(cmp.Or(s.clickHouse, s.ClickHouse.Native), env...))
	}
	s.admin = s.relays[len(s.relays)-1].AdminURL()
	if s.read == nil {
		s.read = s.page
	}
	for i, program := range append([]*programs.Process{api}, s.relays...) {
		job := s.name
		if i == 0 {
			job += " api"
		}
		t := &endpoint{url: program.AdminURL(), labels: map[string]string{"job": job, "outbox": s.name, "instance": fmt.Sprint(job, " ", i)}}
		group.Go(func() error {
			m.scrape(scraping, t)
			return nil
		})
	}
}

// load publishes events until ctx ends. A slow response does not delay further events.
func (s *stall) load(ctx context.Context) error {
	pace := rate.NewLimiter(perSecond, 1)
	var requests errgroup.Group
	requests.SetLimit(10 * perSecond)
	for pace.Wait(ctx) == nil {
		requests.Go(func() error {
			s.publish(context.WithoutCancel(ctx), "order_placed")
			return nil
		})
	}
	return requests.Wait()
}

func (s *stall) publish(ctx context.Context, eventType string) {
	response, err := system.Post(ctx, s.url+"/v1/events", map[string]any{"event_type": eventType, "event_context": map[string]int{"n": 1}})
	s.mu.Lock()
	defer s.mu.Unlock()
	id, ok := response.Body["event_id"].(string)
	if err != nil || response.Status != http.StatusAccepted || !ok {
		s.failed++
		return
	}
	s.ids = append(s.ids, id)
}

var (
	verdictOfPage = regexp.MustCompile(`(?s)<section id="verdict".*?>(.*?)</section>`)
	tags          = regexp.MustCompile(`<[^>]*>`)
	emptyLines    = regexp.MustCompile(`\s*\n\s*`)
)

// page returns the verdict and the advice on the page of the last relay.
func (s *stall) page(ctx context.Context) (string, error) {
	body, err := get(ctx, s.admin, scrapeTimeout)
	if err != nil {
		return "", err
	}
	found := verdictOfPage.FindStringSubmatch(body)
	if found == nil {
		return "", fmt.Errorf("no verdict: %s", body)
	}
	lines := strings.NewReplacer("</li>", "\n", "</h2>", "\n", "</a>", "\n", "</p>", "\n").Replace(found[1])
	text := emptyLines.ReplaceAllString(strings.TrimSpace(html.UnescapeString(tags.ReplaceAllString(lines, ""))), "\n")
	return strings.TrimSuffix(text, "\nPause"), nil
}

// expected returns the regular expression for the text of the page at a time. It is empty
// shortly after a change.
func (s *stall) expected(at, begin, end time.Time) string {
	switch {
	case at.Before(begin) || at.After(end.Add(noticed)):
		return `^Delivering: .*\.$`
	case at.After(begin.Add(noticed)) && at.Before(end):
		return s.verdict
	}
	return ""
}

// look reads the page, and checks its text if expected is not empty.
func (s *stall) look(ctx context.Context, expected string) {
	GinkgoHelper()
	text, err := s.read(ctx)
	now := time.Now()
	if err != nil {
		s.problems = append(s.problems, err.Error())
		return
	}
	if last := len(s.shown) - 1; last >= 0 && shape(s.shown[last].text) == shape(text) {
		s.shown[last].last, s.shown[last].text = now, text
	} else {
		s.shown = append(s.shown, shown{text, now, now})
	}
	if !regexp.MustCompile(expected).MatchString(text) {
		s.problems = append(s.problems, fmt.Sprintf("at %s the page says:\n%s\nexpected %s", now.Format(time.TimeOnly), text, expected))
	}
}

// shape returns the text without its figures.
func shape(text string) string { return figures.ReplaceAllString(text, "#") }

var figures = regexp.MustCompile(`\d[\d,.:]*( (ms|s|min|h))?( \d+ s)?`)

// record records the alerts that fire at a time.
func (s *stall) record(firing []alert, at time.Time) {
	for _, a := range firing {
		if a.labels["outbox"] == s.name || strings.TrimSuffix(a.labels["job"], " api") == s.name {
			period, ok := s.fired[a.name]
			if !ok {
				period[0] = at
			}
			period[1] = at
			s.fired[a.name] = period
		}
	}
}

// check compares the alerts that have fired with the expected alerts.
func (s *stall) check(begin, end, last time.Time) {
	expect := func(name string, from time.Time, within time.Duration, required bool) {
		period, ok := s.fired[name]
		switch {
		case !ok && required:
			s.problems = append(s.problems, name+" has not fired")
		case ok && period[0].Before(from):
			s.problems = append(s.problems, fmt.Sprintf("%s fires %s too early", name, from.Sub(period[0])))
		case ok && period[0].After(from.Add(within)):
			s.problems = append(s.problems, fmt.Sprintf("%s fires after %s", name, period[0].Sub(from)))
		}
	}
	for name, within := range s.during {
		expect(name, begin, within, end.Sub(begin) >= within)
	}
	for name, within := range s.after {
		expect(name, end, within, true)
	}
	for name, period := range s.fired {
		isLate := name == burnsSlowly && s.during[burns]+s.after[burns] > 0
		if s.during[name]+s.after[name] == 0 && !isLate && !slices.Contains(s.may, name) {
			s.problems = append(s.problems, name+" fires, but should not")
		}
		if period[1].Equal(last) && !slices.Contains(lasting, name) {
			s.problems = append(s.problems, name+" has not ended")
		}
	}
}

// checkDelivered expects every published event in ClickHouse once.
func (s *stall) checkDelivered(ctx context.Context) {
	GinkgoHelper()
	s.AwaitEmpty(ctx)
	rows, distinct := s.Arrived(ctx, Default)
	var joined string
	Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT arrayStringConcat(groupArray(toString(event_id)), ' ') FROM event_log", &joined)).To(Succeed())
	arrived := map[string]bool{}
	for id := range strings.FieldsSeq(joined) {
		arrived[id] = true
	}
	lost := 0
	for _, id := range s.ids {
		if !arrived[id] {
			lost++
		}
	}
	// The outcome of a failed request may be unknown.
	if lost != 0 || rows != distinct || distinct < len(s.ids) || distinct > len(s.ids)+s.failed {
		s.problems = append(s.problems, fmt.Sprintf("%d events published, %d requests failed, %d rows and %d events arrived, %d lost",
			len(s.ids), s.failed, rows, distinct, lost))
	}
}

// report describes the alerts and the page, with times from the beginning of the stall.
func (s *stall) report(begin time.Time) string {
	var text strings.Builder
	since := func(t time.Time) string { return t.Sub(begin).Round(time.Second).String() }
	fmt.Fprintf(&text, "%s: %d events, %d failed requests\n", s.name, len(s.ids), s.failed)
	for _, name := range slices.SortedFunc(maps.Keys(s.fired), func(a, b string) int { return s.fired[a][0].Compare(s.fired[b][0]) }) {
		fmt.Fprintf(&text, "  %s from %s to %s\n", name, since(s.fired[name][0]), since(s.fired[name][1]))
	}
	for _, shown := range s.shown {
		fmt.Fprintf(&text, "  page from %s to %s: %s\n", since(shown.first), since(shown.last), strings.ReplaceAll(shown.text, "\n", "\n    "))
	}
	for _, problem := range s.problems {
		fmt.Fprintf(&text, "  PROBLEM: %s\n", problem)
	}
	return text.String()
}

var _ = Describe("During a stall", Serial, Label("stalls"), func() {
	It("exactly the alerts that should fire do, and the page is right", func(ctx SpecContext) {
		duration, err := time.ParseDuration(cmp.Or(os.Getenv(stallsEnv), stallsLoad.String()))
		Expect(err).NotTo(HaveOccurred())
		Expect(duration).To(BeNumerically(">=", stallsLoad), "the time that the alerts need")
		e := &servers{programs: programs.Build()(ctx), postgres: startPostgres(ctx), clickHouse: startClickHouse(ctx)}
		all := stalls(ctx, e)
		stored := &memory{all: map[uint64]*scraped{}}
		var group errgroup.Group
		working, stop := context.WithCancel(ctx)
		DeferCleanup(func() {
			stop()
			_ = group.Wait() // no function returns an error
		})
		for _, s := range all {
			s.start(working, stored, &group)
		}

		server := newServer(readRules(), interval, stored.series)
		began := time.Now()
		begin, end, over := began.Add(duration/10), began.Add(duration-duration/10), began.Add(duration)
		loading, stopLoad := context.WithDeadline(working, over)
		defer stopLoad()
		for _, s := range all {
			group.Go(func() error { return s.load(loading) })
		}
		const before, stalled, after = 0, 1, 2
		phase, at := before, began
		for !at.After(over.Add(afterLoad)) {
			at = at.Add(interval)
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Until(at)):
			}
			firing := server.alerts(ctx, at)
			for _, s := range all {
				s.record(firing, at)
				s.look(ctx, s.expected(at, begin, end))
			}
			switch {
			case phase == before && !at.Before(begin):
				begin, phase = time.Now(), stalled
				for _, s := range all {
					s.begin(ctx)
				}
			case phase == stalled && !at.Before(end):
				end, phase = time.Now(), after
				for _, s := range all {
					s.end(ctx)
				}
			}
		}

		var problems []string
		for _, s := range all {
			s.check(begin, end, at)
			s.checkDelivered(ctx)
			AddReportEntry(s.name, ReportEntryVisibilityAlways, s.report(begin))
			for _, problem := range s.problems {
				problems = append(problems, s.name+": "+problem)
			}
		}
		Expect(problems).To(BeEmpty())
	})
})
