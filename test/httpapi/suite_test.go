package httpapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/httpapi"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/telemetry"
	"github.com/diehard-outbox/diehard/pkg/users"
)

func TestHTTPAPI(t *testing.T) {
	RegisterFailHandler(Fail)
	EnforceDefaultTimeoutsWhenUsingContexts()
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "httpapi")
}

var suite = testengines.Start(testengines.Options{Postgres: true})

// db is the database, empty for each spec.
var db *sqlx.DB

var _ = BeforeEach(func(ctx SpecContext) {
	db = testengines.OpenPostgres(suite.LastingPostgresDSN(ctx), nil)
})

// onDatabase configures a server for the database.
func onDatabase(db *sqlx.DB) func(*httpapi.Options) {
	publisher := outbox.NewPublisher(outbox.PublisherOptions{})
	return func(o *httpapi.Options) {
		o.DB, o.Publisher = db, publisher
		o.Users = users.NewService(users.Options{DB: db, Publisher: publisher})
		o.Idempotency = idempotency.NewKeeper(idempotency.Options{DB: db})
	}
}

// api is a running server.
type api struct {
	*httpapi.Server

	url      string
	log      *gbytes.Buffer
	registry *prometheus.Registry
	stop     context.CancelFunc
	stopped  chan error // the result of Run
}

// start runs a server until the spec ends or stops it. The server uses this
// process's database, unless change sets another one.
func start(ctx context.Context, change ...func(*httpapi.Options)) *api {
	GinkgoHelper()
	a := &api{log: gbytes.NewBuffer(), registry: prometheus.NewRegistry(), stopped: make(chan error, 1)}
	options := httpapi.Options{
		Addr:       "127.0.0.1:0",
		AuthOff:    true,
		Log:        telemetry.NewLogger(io.MultiWriter(a.log, GinkgoWriter), telemetry.LogOptions{}),
		Registerer: a.registry,
	}
	onDatabase(db)(&options)
	for _, f := range change {
		f(&options)
	}
	a.Server = httpapi.New(options)
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	a.stop = stop
	go func() { a.stopped <- a.Run(running) }()
	DeferCleanup(func(ctx SpecContext) {
		http.DefaultClient.CloseIdleConnections()
		stop()
		select {
		case err := <-a.stopped:
			Expect(err).NotTo(HaveOccurred())
		case <-ctx.Done():
			Fail("the server did not stop")
		}
	})
	Eventually(ctx, a.Addr).ShouldNot(BeEmpty())
	a.url = "http://" + a.Addr()
	return a
}

// response is an HTTP response with its complete body.
type response struct {
	status int
	header http.Header
	body   string
}

func statusOf(a response) int { return a.status }

// object decodes the body as a JSON object.
func (a response) object() map[string]any {
	GinkgoHelper()
	var object map[string]any
	Expect(json.Unmarshal([]byte(a.body), &object)).To(Succeed(), a.body)
	return object
}

// keepBody returns the request's body, and restores it for sending. The client still
// sends a body without a length in chunks.
func keepBody(request *http.Request) []byte {
	GinkgoHelper()
	if request.Body == nil {
		return nil
	}
	sent, err := io.ReadAll(request.Body)
	Expect(err).NotTo(HaveOccurred())
	request.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(sent)), nil }
	request.Body, _ = request.GetBody()
	return sent
}

// try sends a request, and checks the response against the OpenAPI document. Each
// header has the form name: value.
func (a *api) try(ctx context.Context, method, path string, body io.Reader, headers ...string) (response, error) {
	GinkgoHelper()
	request, err := http.NewRequestWithContext(ctx, method, a.url+path, body)
	Expect(err).NotTo(HaveOccurred())
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	given := http.Header{}
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		given.Add(name, value)
	}
	maps.Copy(request.Header, given)
	sent := keepBody(request)
	received, err := http.DefaultClient.Do(request)
	if err != nil {
		return response{}, err
	}
	defer received.Body.Close()
	content, err := io.ReadAll(received.Body)
	if err == nil {
		expectAsDocumented(exchange{request: request, sent: sent, response: received, received: content})
	}
	return response{status: received.StatusCode, header: received.Header, body: string(content)}, err
}

func (a *api) do(ctx context.Context, method, path string, body io.Reader, headers ...string) response {
	GinkgoHelper()
	result, err := a.try(ctx, method, path, body, headers...)
	Expect(err).NotTo(HaveOccurred())
	return result
}

func (a *api) get(ctx context.Context, path string, headers ...string) response {
	GinkgoHelper()
	return a.do(ctx, http.MethodGet, path, nil, headers...)
}

func (a *api) create(ctx context.Context, body string, headers ...string) response {
	GinkgoHelper()
	return a.do(ctx, http.MethodPost, "/v1/users", bytes.NewBufferString(body), headers...)
}

// expectProblem expects the response to be a complete problem of this kind. It expects
// docs/errors.md to have a section for the problem. It returns the problem.
func expectProblem(a response, status int, slug string) map[string]any {
	GinkgoHelper()
	Expect(a.status).To(Equal(status), a.body)
	Expect(a.header.Get("Content-Type")).To(Equal("application/problem+json"))
	Expect(a.header.Get("Cache-Control")).To(Equal("no-store"))
	problem := a.object()
	Expect(problem).To(SatisfyAll(
		HaveKeyWithValue("type", "https://github.com/diehard-outbox/diehard/blob/main/docs/errors.md#"+slug),
		HaveKeyWithValue("title", Not(BeEmpty())),
		HaveKeyWithValue("status", BeEquivalentTo(status)),
		HaveKeyWithValue("detail", Not(BeEmpty())),
		HaveKeyWithValue("request_id", a.header.Get("X-Request-ID")),
	))
	Expect(a.header.Get("X-Request-ID")).NotTo(BeEmpty())
	documentation, err := os.ReadFile("../../docs/errors.md")
	Expect(err).NotTo(HaveOccurred())
	Expect(string(documentation)).To(MatchRegexp(`(?m)^## %s$`, slug))
	return problem
}

// invalidValue returns an element of a problem's errors.
func invalidValue(place, name, detail string) any {
	return map[string]any{place: name, "detail": detail}
}

func count(ctx context.Context, table string) int {
	GinkgoHelper()
	var n int
	Expect(db.GetContext(ctx, &n, "SELECT count(*) FROM "+table)).To(Succeed())
	return n
}

// lockUsers blocks every statement on users until release is called.
func lockUsers(ctx context.Context) (release func()) {
	GinkgoHelper()
	tx, err := db.BeginTxx(context.WithoutCancel(ctx), nil)
	Expect(err).NotTo(HaveOccurred())
	release = func() { _ = tx.Rollback() }
	DeferCleanup(release)
	_, err = tx.ExecContext(ctx, "LOCK TABLE users")
	Expect(err).NotTo(HaveOccurred())
	return release
}

// waitingForLock counts the statements that wait for a lock.
func waitingForLock(ctx context.Context) int {
	GinkgoHelper()
	return count(ctx, "pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
}
