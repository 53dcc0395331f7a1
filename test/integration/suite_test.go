// Package integration_test drives the built programs against real engines: a
// request creates a user and its event, relays carry the event to ClickHouse.
package integration_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/engines"
	"github.com/diehard-outbox/diehard/test/programs"
)

func TestIntegration(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "integration")
}

var suite = engines.Start(engines.Options{ClickHouse: true, Prepare: programs.Build})

// patience is how long a spec waits for what must happen.
const patience = 2 * time.Minute

// protocols are what ClickHouse is spoken to in.
var protocols = []TableEntry{Entry("over the native protocol", "native"), Entry("over HTTP", "http")}

// system is one spec's databases, and what runs on them.
type system struct {
	postgresDSN string
	postgres    *sqlx.DB
	clickHouse  engines.ClickHouseDSNs
	publisher   *outbox.Publisher
}

func newSystem(ctx context.Context) *system {
	GinkgoHelper()
	s := &system{
		postgresDSN: suite.PostgresDSN(ctx),
		clickHouse:  suite.ClickHouseDSNs(ctx),
		publisher:   outbox.NewPublisher(outbox.PublisherOptions{Environment: "Test"}),
	}
	s.postgres = engines.OpenPostgres(s.postgresDSN, nil)
	return s
}

func (s *system) clickHouseDSN(protocol string) string {
	if protocol == "http" {
		return s.clickHouse.HTTP
	}
	return s.clickHouse.Native
}

// api starts an API. It is not told where ClickHouse is.
func (s *system) api(env ...string) *programs.Process {
	GinkgoHelper()
	return programs.Serve(suite.Prepared(), "api", true, append([]string{
		"DIEHARD_POSTGRES_DSN=" + s.postgresDSN, "DIEHARD_ENVIRONMENT=Test",
	}, env...)...)
}

// relay starts a relay that reaches ClickHouse at clickHouseDSN.
func (s *system) relay(clickHouseDSN string, env ...string) *programs.Process {
	GinkgoHelper()
	return programs.Serve(suite.Prepared(), "relay", true, append([]string{
		"DIEHARD_POSTGRES_DSN=" + s.postgresDSN, "DIEHARD_CLICKHOUSE_DSN=" + clickHouseDSN,
		"DIEHARD_RELAY_BACKOFF_MIN=10ms", "DIEHARD_RELAY_BACKOFF_MAX=200ms",
	}, env...)...)
}

// publish commits the events, all in one transaction.
func (s *system) publish(ctx context.Context, events ...outbox.Event) error {
	tx, err := s.postgres.BeginTxx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	if err := s.publisher.Publish(ctx, tx, events...); err != nil {
		return err
	}
	return tx.Commit()
}

// event returns an event that a spec does not care more about.
func event(opts ...outbox.Option) outbox.Event {
	GinkgoHelper()
	e, err := outbox.NewEvent(map[string]int{"n": 1}, append([]outbox.Option{outbox.WithType("thing_happened")}, opts...)...)
	Expect(err).NotTo(HaveOccurred())
	return e
}

func events(n int) []outbox.Event {
	GinkgoHelper()
	all := make([]outbox.Event, n)
	for i := range all {
		all[i] = event()
	}
	return all
}

// left counts what is left in the outbox.
func (s *system) left(g Gomega) (events, batches, dead int) {
	g.Expect(s.postgres.QueryRow(`SELECT (SELECT count(*) FROM outbox_events), (SELECT count(*) FROM outbox_batches),
		(SELECT count(*) FROM outbox_dead_letters)`).Scan(&events, &batches, &dead)).To(Succeed())
	return events, batches, dead
}

// arrived counts the rows in ClickHouse, and the distinct events among them.
// Merges are stopped: what arrived twice is there twice.
func (s *system) arrived(ctx context.Context, g Gomega) (rows, distinct int) {
	g.Expect(engines.Scan(ctx, s.clickHouse.HTTP, "SELECT count(), uniqExact(event_id) FROM event_log", &rows, &distinct)).To(Succeed())
	return rows, distinct
}

// inserts counts the inserts that ClickHouse is executing.
func (s *system) inserts(ctx context.Context) (running int, err error) {
	err = engines.Scan(ctx, s.clickHouse.HTTP,
		"SELECT count() FROM system.processes WHERE query ILIKE 'INSERT%' AND current_database = currentDatabase()", &running)
	return running, err
}

// expectDelivered waits until nothing is left in the outbox, and expects n
// events in ClickHouse then, each once.
func (s *system) expectDelivered(ctx context.Context, n int) {
	GinkgoHelper()
	Eventually(ctx, func(g Gomega) {
		events, batches, dead := s.left(g)
		g.Expect(events).To(BeZero(), "events in the outbox")
		g.Expect(batches).To(BeZero(), "batches in the outbox")
		g.Expect(dead).To(BeZero(), "dead letters")
	}).WithTimeout(patience).WithPolling(20 * time.Millisecond).Should(Succeed())
	rows, distinct := s.arrived(ctx, Default)
	Expect(rows).To(Equal(n), "rows in ClickHouse")
	Expect(distinct).To(Equal(n), "distinct events in ClickHouse")
}

// answer is what the API has answered.
type answer struct {
	Status  int
	Headers http.Header
	Body    map[string]any
}

// client has room for every request that a spec has under way.
var client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100}}

// post sends a JSON body and reads a JSON answer.
func post(ctx context.Context, url string, body any) (answer, error) {
	encoded, err := json.Marshal(body)
	if err != nil {
		return answer{}, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(encoded))
	if err != nil {
		return answer{}, err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := client.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return answer{}, err
	}
	a := answer{Status: response.StatusCode, Headers: response.Header}
	if err := json.Unmarshal(content, &a.Body); err != nil {
		return answer{}, fmt.Errorf("%w: %s", err, content)
	}
	return a, nil
}

// newUser is the body of a request.
type newUser struct {
	Email     string `json:"email"`
	FirstName string `json:"first_name,omitempty"`
	LastName  string `json:"last_name,omitempty"`
}

// create creates a user and returns its id.
func create(ctx context.Context, api *programs.Process, user newUser) string {
	GinkgoHelper()
	a, err := post(ctx, api.URL()+"/v1/users", user)
	Expect(err).NotTo(HaveOccurred())
	Expect(a.Status).To(Equal(http.StatusCreated), "%v", a.Body)
	id, ok := a.Body["id"].(string)
	Expect(ok).To(BeTrue())
	return id
}
