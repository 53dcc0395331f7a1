package httpapi

import (
	stdjson "encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/labstack/echo/v4"
)

// FuzzBody takes bodies apart as the routes do, each in every way.
func FuzzBody(f *testing.F) {
	for _, seed := range []string{
		"", "{}", "null", `{"email":"ada@example.com","first_name":"\u0000"}`, `{"a":1,"a":2}`, `{"a":"\ud800"}`, "{\"a\":\"\xff\"}",
		`{"event_type":"a","event_context":{"b": [1e400, -0, NaN]}}`, `{"data":[{"email":"a@b.example"},1,null,[]]}`,
		`{"event_date_time":"2026-01-31T12:00:00.5+14:00","metadata_version":9223372036854775808}`, `{} {}`, "\ufeff{}",
		strings.Repeat("[", MaxDepth+1), `{"a":` + strings.Repeat(`{"":`, MaxDepth), `{"data":[` + strings.Repeat("1,", maxBatchItems) + `1]}`,
		`{"a/b~c":1,"\"\\[":"]\\\""}`,
	} {
		f.Add([]byte(seed))
	}
	s := New(Options{Log: slog.New(slog.DiscardHandler)})
	f.Fuzz(func(t *testing.T, body []byte) {
		request := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/users", strings.NewReader(string(body)))
		request.Header.Set(echo.HeaderContentType, echo.MIMEApplicationJSON)
		c := s.echo.NewContext(request, httptest.NewRecorder())
		o, err := s.readObject(c)
		if err != nil {
			expectRefusal(t, err)
			return
		}
		if !stdjson.Valid(body) || !utf8.Valid(body) {
			t.Fatalf("%q is taken for JSON", body)
		}
		for _, item := range o.requiredArray("data", maxBatchItems) {
			takeApart(t, c, newItem(item, "/data/0"))
		}
		takeApart(t, c, o)
	})
}

// takeApart takes everything that a route may ask for out of the object.
func takeApart(t *testing.T, c echo.Context, o *object) {
	t.Helper()
	user, event := readUser(c, o), readEvent(c, o)
	for _, text := range []string{user.Email, user.FirstName, user.LastName, event.EventType} {
		if !utf8.ValidString(text) {
			t.Errorf("%q is no text", text)
		}
	}
	if event.EventContext != nil && !stdjson.Valid(event.EventContext) {
		t.Errorf("%q is no JSON", event.EventContext)
	}
	if err := o.check(userRules(user.Validate())); err != nil {
		expectRefusal(t, err)
	}
}

// expectRefusal checks that the error is a client's, and says where it is.
func expectRefusal(t *testing.T, err error) {
	t.Helper()
	p, ok := errors.AsType[*problemError](err)
	if !ok || p.problem.status != http.StatusBadRequest && p.problem.status != http.StatusUnprocessableEntity {
		t.Fatalf("refused with %v", err)
	}
	for _, wrong := range p.errors {
		if wrong.Pointer == nil || !utf8.ValidString(*wrong.Pointer+wrong.Detail) {
			t.Errorf("%+v tells of nothing", wrong)
		}
	}
}
