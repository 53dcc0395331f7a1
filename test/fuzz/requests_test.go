// Package fuzz_test sends fuzzed requests to the API, on a real PostgreSQL. It is a
// separate package, because the fuzzer recompiles all dependencies of a test. The
// dependencies of the other suites take minutes to compile.
package fuzz_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/diehard-outbox/diehard/pkg/httpapi"
	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/users"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// dsnEnv names the variable that passes the database's DSN to the fuzzer's
// workers.
const dsnEnv = "DIEHARD_FUZZ_POSTGRES_DSN"

func TestMain(m *testing.M) {
	if os.Getenv(dsnEnv) != "" {
		os.Exit(m.Run())
	}
	code, err := withPostgres(context.Background(), m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// withPostgres runs the tests on a PostgreSQL that it starts and stops.
func withPostgres(ctx context.Context, run func() int) (code int, err error) {
	server, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{})
	if err != nil {
		return 0, err
	}
	defer func() {
		if stopErr := server.Stop(); err == nil {
			err = stopErr
		}
	}()
	db, err := postgres.Open(postgres.Options{DSN: server.DSN("postgres")})
	if err != nil {
		return 0, err
	}
	defer db.Close()
	schema := postgres.Schema{Sets: []postgres.Set{postgres.Outbox, postgres.Users}}
	if err := schema.Migrate(ctx, db.DB, slog.New(slog.DiscardHandler)); err != nil {
		return 0, err
	}
	if err := os.Setenv(dsnEnv, server.DSN("postgres")); err != nil {
		return 0, err
	}
	return run(), nil
}

// start serves the API until the test ends, and returns its URL.
func start(f *testing.F) string {
	f.Helper()
	db, err := postgres.Open(postgres.Options{DSN: os.Getenv(dsnEnv)})
	if err != nil {
		f.Fatal(err)
	}
	publisher := outbox.NewPublisher(outbox.PublisherOptions{})
	server := httpapi.New(httpapi.Options{
		Addr:        "127.0.0.1:0",
		AuthOff:     true,
		DB:          db,
		Users:       users.NewService(users.Options{DB: db, Publisher: publisher}),
		Publisher:   publisher,
		Idempotency: idempotency.NewKeeper(idempotency.Options{DB: db}),
		Log:         slog.New(slog.DiscardHandler),
	})
	ctx, stop := context.WithCancel(context.Background())
	stopped := make(chan error, 1)
	go func() { stopped <- server.Run(ctx) }()
	f.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		stop()
		if err := <-stopped; err != nil {
			f.Error(err)
		}
		_ = db.Close()
	})
	for server.Addr() == "" {
		select {
		case err := <-stopped:
			f.Fatal(err)
		default:
			runtime.Gosched()
		}
	}
	return "http://" + server.Addr()
}

// answer is a response with its complete body.
type answer struct {
	status int
	body   []byte
}

// ask sends a request and checks the rules that hold for every response. It skips
// requests that the client refuses to send.
func ask(t *testing.T, method, address string, header http.Header, body []byte, statuses ...int) answer {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, address, bytes.NewReader(body))
	if err != nil {
		t.Skip(err)
	}
	request.Header = header
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		if strings.Contains(err.Error(), "net/http: invalid header") {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	defer response.Body.Close()
	a := answer{status: response.StatusCode}
	if a.body, err = io.ReadAll(response.Body); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(statuses, a.status) {
		t.Fatalf("unexpected status %d: %s", a.status, a.body)
	}
	if !json.Valid(a.body) || !utf8.Valid(a.body) {
		t.Errorf("%d with a body that is not JSON: %q", a.status, a.body)
	}
	if a.status >= http.StatusBadRequest {
		expectProblem(t, a, response.Header)
	}
	return a
}

// expectProblem checks that the problem is complete and names the location of
// each error.
func expectProblem(t *testing.T, a answer, header http.Header) {
	t.Helper()
	var problem struct {
		Type      string `json:"type"`
		Title     string `json:"title"`
		RequestID string `json:"request_id"`
		Status    int    `json:"status"`
		Errors    []struct {
			Pointer   *string `json:"pointer"`
			Parameter *string `json:"parameter"`
			Detail    string  `json:"detail"`
		} `json:"errors"`
	}
	if err := json.Unmarshal(a.body, &problem); err != nil {
		t.Fatal(err)
	}
	if header.Get("Content-Type") != "application/problem+json" || problem.Status != a.status ||
		problem.Type == "" || problem.Title == "" || problem.RequestID == "" {
		t.Errorf("incomplete problem: %s", a.body)
	}
	for _, wrong := range problem.Errors {
		if wrong.Pointer == nil && wrong.Parameter == nil || wrong.Detail == "" {
			t.Errorf("%+v names no location or no detail", wrong)
		}
	}
}

var (
	jsonBody = http.Header{"Content-Type": {"application/json"}}
	posts    = []string{
		"/v1/users", "/v1/events", "/v1/users/batch", "/v1/events/batch", "/v1/users/batch?atomic=true", "/v1/events/batch?atomic=true", "/v1/users/batch/delete",
	}
	changed = []int{http.StatusOK, http.StatusCreated, http.StatusAccepted}
	refused = []int{http.StatusBadRequest, http.StatusConflict, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity}
)

func FuzzPost(f *testing.F) {
	bodies := []string{
		"", "{}", "null", `{"email":"ada@example.com","first_name":"\u0000"}`, `{"a":1,"a":2}`, `{"email":"\ud800"}`, "{\"email\":\"\xff\"}",
		`{"email":"bob@example.com","first_name":" Bob ","last_name":"Zoe\u0308"}`, `{} {}`, "\ufeff{}", `{"a/b~c":1,"\"\\[":"]\\\""}`,
		`{"event_type":"a","event_context":{"b": [1e400, -0]}}`, `{"event_type":"a","event_context":{"b":NaN}}`,
		`{"event_type":"a","event_context":{},"event_date_time":"2026-01-31T12:00:00.5+14:00","metadata_version":9223372036854775808}`,
		`{"event_type":"a","event_context":{"a":"\u0000\u2028","b":{"a":{}}},"event_date_time":"2299-12-31T23:59:59.999999Z","metadata_version":-1}`,
		`{"data":[{"email":"a@b.example"},1,null,[],{"email":"A@b.example"}]}`, `{"data":[{"event_type":"a","event_context":{}},{}]}`, `{"data":[]}`,
		strings.Repeat("[", input.MaxDepth+1), `{"event_type":"a","event_context":` + strings.Repeat(`{"":`, 20) + "1" + strings.Repeat("}", 21),
	}
	for route := range posts {
		for _, body := range bodies {
			f.Add(uint8(route), []byte(body))
		}
	}
	api := start(f)
	f.Fuzz(func(t *testing.T, route uint8, body []byte) {
		a := ask(t, http.MethodPost, api+posts[int(route)%len(posts)], jsonBody, body, append(changed, refused...)...)
		if a.status < http.StatusBadRequest && (!json.Valid(body) || !utf8.Valid(body)) {
			t.Errorf("%q is accepted as JSON", body)
		}
	})
}

func FuzzList(f *testing.F) {
	for _, query := range []string{
		"", "limit=1", "limit=1&limit=2", "limit=-1", "limit=999999999999999999999", "cursor=AAAAAAAAAAAAAAAAAAAAAA", "cursor=%00",
		"email=ada%40example.com", "email=%ff", "email=a%00b", "email=ada@[127.0.0.1]", "e%6dail=", "filter=x", "%", "a=%zz", ";",
	} {
		f.Add(query)
	}
	api := start(f)
	f.Fuzz(func(t *testing.T, query string) {
		if strings.ContainsFunc(query, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
			t.Skip("no client sends these characters unescaped, and net/http responds to them itself")
		}
		address, err := url.Parse(api + "/v1/users")
		if err != nil {
			t.Fatal(err)
		}
		address.RawQuery = query
		ask(t, http.MethodGet, address.String(), http.Header{}, nil, http.StatusOK, http.StatusBadRequest, http.StatusUnprocessableEntity)
	})
}

func FuzzHeaders(f *testing.F) {
	f.Add("application/json", "", "", "", "")
	f.Add("application/json; charset=utf-8", "a", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "b", "identity")
	f.Add("text/plain", "ä", "00-0-0-0", `"8e03978e-40d5-43dd-bc93-6894a57f9324"`, "gzip")
	f.Add(`application/json; charset="`, "\xff", "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x", "\xff", "")
	api := start(f)
	f.Fuzz(func(t *testing.T, mediaType, id, traceparent, key, encoding string) {
		header := http.Header{
			"Content-Type": {mediaType}, "X-Request-Id": {id}, "Traceparent": {traceparent}, "Idempotency-Key": {key}, "Content-Encoding": {encoding},
		}
		ask(t, http.MethodPost, api+"/v1/events", header, []byte(`{"event_type":"a","event_context":{}}`),
			http.StatusAccepted, http.StatusBadRequest, http.StatusConflict, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity)
	})
}
