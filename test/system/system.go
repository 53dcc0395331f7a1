// Package system runs the built programs on a spec's databases, and counts the
// delivered events.
package system

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/programs"
)

// Polling is the time between two checks for an expected effect. A check may open a
// connection, so a shorter time would take much CPU time from the programs.
const Polling = 50 * time.Millisecond

// Patience limits the wait for an expected effect.
const Patience = 2 * time.Minute

// System is a spec's databases with the programs on them.
type System struct {
	PostgresDSN string
	Postgres    *sqlx.DB
	ClickHouse  testengines.ClickHouseDSNs
	programs    string // folder of the programs
	pooled      string // the address of PostgreSQL for the programs, or empty for PostgresDSN
	publisher   *outbox.Publisher
}

const (
	// poolerEnv makes the programs of all specs reach PostgreSQL through a PgBouncer in
	// transaction mode, unless a spec gives them another address. See the target
	// test/pooler of the Makefile.
	poolerEnv = "DIEHARD_TEST_POOLER"
	// poolSize is enough for the programs of a spec.
	poolSize = 40
)

// New returns a System for these databases and the programs of the folder.
func New(dir, postgresDSN string, clickHouse testengines.ClickHouseDSNs) *System {
	GinkgoHelper()
	s := &System{
		PostgresDSN: postgresDSN,
		Postgres:    testengines.OpenPostgres(postgresDSN, nil),
		ClickHouse:  clickHouse,
		programs:    dir,
		publisher:   outbox.NewPublisher(outbox.PublisherOptions{Environment: "Test"}),
	}
	if os.Getenv(poolerEnv) != "" {
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		s.pooled = testengines.StartPgBouncer(ctx, postgresDSN, poolSize)
	}
	return s
}

// ProgramsDSN returns the address of PostgreSQL for the programs.
func (s *System) ProgramsDSN() string { return cmp.Or(s.pooled, s.PostgresDSN) }

// postgresEnv returns the variables with the address of PostgreSQL for a program.
func (s *System) postgresEnv() []string {
	env := []string{"DIEHARD_POSTGRES_DSN=" + s.ProgramsDSN()}
	if s.pooled != "" {
		env = append(env, "DIEHARD_POSTGRES_LISTEN_DSN="+s.PostgresDSN)
	}
	return env
}

// ClickHouseDSN returns the DSN for the protocol, native or http. It enables the
// compression that a relay uses over a network. Within a machine the default is no
// compression.
func (s *System) ClickHouseDSN(protocol string) string {
	dsn := s.ClickHouse.Native
	if protocol == "http" {
		dsn = s.ClickHouse.HTTP
	}
	return dsn + "?compress=lz4"
}

// API starts an API and waits until it is ready. The API does not get
// ClickHouse's address.
func (s *System) API(env ...string) *programs.Process {
	GinkgoHelper()
	api := s.LaunchAPI(env...)
	api.AwaitReady()
	return api
}

// LaunchAPI is like API, but does not wait.
func (s *System) LaunchAPI(env ...string) *programs.Process {
	GinkgoHelper()
	return programs.Serve(s.programs, "api", slices.Concat(s.postgresEnv(), []string{"DIEHARD_ENVIRONMENT=Test"}, env)...)
}

// Relay starts a relay that reaches ClickHouse at clickHouseDSN, and waits
// until it is ready.
func (s *System) Relay(clickHouseDSN string, env ...string) *programs.Process {
	GinkgoHelper()
	relay := s.LaunchRelay(clickHouseDSN, env...)
	relay.AwaitReady()
	return relay
}

// LaunchRelay is like Relay, but does not wait.
func (s *System) LaunchRelay(clickHouseDSN string, env ...string) *programs.Process {
	GinkgoHelper()
	return programs.Serve(s.programs, "relay", slices.Concat(s.postgresEnv(), []string{
		"DIEHARD_CLICKHOUSE_DSN=" + clickHouseDSN, "DIEHARD_RELAY_BACKOFF_MIN=10ms", "DIEHARD_RELAY_BACKOFF_MAX=200ms",
	}, env)...)
}

// Publish publishes the events in one transaction.
func (s *System) Publish(ctx context.Context, events ...outbox.Event) error {
	tx, err := s.Postgres.BeginTxx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	if err := s.PublishIn(ctx, tx, events...); err != nil {
		return err
	}
	return tx.Commit()
}

// PublishIn publishes the events in the given transaction.
func (s *System) PublishIn(ctx context.Context, tx *sqlx.Tx, events ...outbox.Event) error {
	return s.publisher.Publish(ctx, tx, events...)
}

// Event returns an event with default values. The options change them.
func Event(opts ...outbox.Option) outbox.Event {
	GinkgoHelper()
	e, err := outbox.NewEvent(map[string]int{"n": 1}, append([]outbox.Option{outbox.WithType("thing_happened")}, opts...)...)
	Expect(err).NotTo(HaveOccurred())
	return e
}

// Events returns n default events.
func Events(n int) []outbox.Event {
	GinkgoHelper()
	all := make([]outbox.Event, n)
	for i := range all {
		all[i] = Event()
	}
	return all
}

// Left counts the rows left in the outbox's tables.
func (s *System) Left(g Gomega) (events, batches, dead int) {
	g.Expect(s.Postgres.QueryRow(`SELECT (SELECT count(*) FROM outbox_events), (SELECT count(*) FROM outbox_batches),
		(SELECT count(*) FROM outbox_dead_letters)`).Scan(&events, &batches, &dead)).To(Succeed())
	return events, batches, dead
}

// Arrived counts the rows and the distinct events in ClickHouse. Merges are
// stopped, so duplicates stay visible.
func (s *System) Arrived(ctx context.Context, g Gomega) (rows, distinct int) {
	g.Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT count(), uniqExact(event_id) FROM event_log", &rows, &distinct)).To(Succeed())
	return rows, distinct
}

// Inserts counts the running inserts of ClickHouse.
func (s *System) Inserts(ctx context.Context) (running int, err error) {
	err = testengines.Scan(ctx, s.ClickHouse.HTTP,
		"SELECT count() FROM system.processes WHERE query ILIKE 'INSERT%' AND current_database = currentDatabase()", &running)
	return running, err
}

// AwaitEmpty waits until the outbox has no event and no batch.
func (s *System) AwaitEmpty(ctx context.Context) {
	GinkgoHelper()
	Eventually(ctx, func(g Gomega) {
		events, batches, _ := s.Left(g)
		g.Expect(events).To(BeZero(), "events in the outbox")
		g.Expect(batches).To(BeZero(), "batches in the outbox")
	}).WithTimeout(Patience).WithPolling(Polling).Should(Succeed())
}

// ExpectDelivered waits until the outbox is empty. It expects n events in ClickHouse,
// each event once, and no dead letter.
func (s *System) ExpectDelivered(ctx context.Context, n int) {
	GinkgoHelper()
	s.AwaitEmpty(ctx)
	_, _, dead := s.Left(Default)
	Expect(dead).To(BeZero(), "dead letters")
	rows, distinct := s.Arrived(ctx, Default)
	Expect(rows).To(Equal(n), "rows in ClickHouse")
	Expect(distinct).To(Equal(n), "distinct events in ClickHouse")
}

// Response is a response of the API.
type Response struct {
	Status  int
	Headers http.Header
	Body    map[string]any
}

// client keeps enough idle connections for all concurrent requests of a spec.
var client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}}

// Post sends a JSON body with headers like "Traceparent: 00-…", and parses the
// JSON response.
func Post(ctx context.Context, url string, body any, headers ...string) (Response, error) {
	return Send(ctx, http.MethodPost, url, body, headers...)
}

// Send is Post with another method. The request has no body if body is nil. Body is nil in
// a response without content.
func Send(ctx context.Context, method, url string, body any, headers ...string) (Response, error) {
	var sent io.Reader = http.NoBody
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return Response{}, err
		}
		sent = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, method, url, sent)
	if err != nil {
		return Response{}, err
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		request.Header.Set(name, value)
	}
	response, err := client.Do(request)
	if err != nil {
		return Response{}, err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return Response{}, err
	}
	a := Response{Status: response.StatusCode, Headers: response.Header}
	if a.Status == http.StatusNoContent {
		return a, nil
	}
	if err := json.Unmarshal(content, &a.Body); err != nil {
		return Response{}, fmt.Errorf("%w: %s", err, content)
	}
	return a, nil
}

// NewUser is the body of a request that creates a user.
type NewUser struct {
	Email     string `json:"email"`
	FirstName string `json:"first_name,omitempty"`
	LastName  string `json:"last_name,omitempty"`
}

// Create creates a user and returns its id.
func Create(ctx context.Context, api *programs.Process, user NewUser) string {
	GinkgoHelper()
	a, err := Post(ctx, api.URL()+"/v1/users", user)
	Expect(err).NotTo(HaveOccurred())
	Expect(a.Status).To(Equal(http.StatusCreated), "%v", a.Body)
	id, ok := a.Body["id"].(string)
	Expect(ok).To(BeTrue())
	return id
}
