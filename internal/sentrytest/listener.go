// Package sentrytest receives a program's reports to Sentry on a local port.
package sentrytest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/otlptest"
)

// Listener replaces Sentry.
type Listener struct {
	server *httptest.Server

	mu       sync.Mutex
	events   []Event
	spans    []otlptest.Span
	problems []error
}

// Event holds the parts of an error or a transaction that specs check. Raw is
// the whole event.
type Event struct {
	Type        string `json:"type"` // "transaction", or empty for an error
	Level       string `json:"level"`
	Message     string `json:"message"`
	Environment string `json:"environment"`
	Release     string `json:"release"`
	Transaction string `json:"transaction"`
	// StartTimestamp and Timestamp are the start and the end of a transaction.
	StartTimestamp  time.Time `json:"start_timestamp"`
	Timestamp       time.Time `json:"timestamp"`
	TransactionInfo struct {
		Source string `json:"source"`
	} `json:"transaction_info"`
	Tags     map[string]string `json:"tags"`
	Contexts struct {
		Log   map[string]any `json:"log"`
		Trace Trace          `json:"trace"`
	} `json:"contexts"`
	Exception []Exception `json:"exception"`
	Threads   []struct {
		Stacktrace Stacktrace `json:"stacktrace"`
	} `json:"threads"`
	Raw json.RawMessage `json:"-"`
}

// Trace is the span of an event.
type Trace struct {
	TraceID      string         `json:"trace_id"`
	SpanID       string         `json:"span_id"`
	ParentSpanID string         `json:"parent_span_id"`
	Op           string         `json:"op"`
	Status       string         `json:"status"`
	Data         map[string]any `json:"data"`
}

// Exception is one error of a chain. The outermost error is the last.
type Exception struct {
	Type       string     `json:"type"`
	Value      string     `json:"value"`
	Stacktrace Stacktrace `json:"stacktrace"`
}

// Stacktrace holds the frames of an error. The innermost frame is the last.
type Stacktrace struct {
	Frames []struct {
		Function string `json:"function"`
		Module   string `json:"module"`
	} `json:"frames"`
}

// Start starts a listener that ends with the spec. The spec fails if a request
// was not a valid envelope.
func Start() *Listener {
	l := &Listener{}
	l.server = httptest.NewServer(http.HandlerFunc(l.receive))
	ginkgo.DeferCleanup(func() {
		l.server.Close()
		Expect(l.problems).To(BeEmpty())
	})
	return l
}

// DSN returns the DSN of the listener.
func (l *Listener) DSN() string {
	return strings.Replace(l.server.URL, "http://", "http://public@", 1) + "/42"
}

// Errors returns the errors received so far.
func (l *Listener) Errors() []Event { return l.of("") }

// Transactions returns the transactions received so far.
func (l *Listener) Transactions() []Event { return l.of("transaction") }

func (l *Listener) of(kind string) (events []Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.events {
		if l.events[i].Type == kind {
			events = append(events, l.events[i])
		}
	}
	return events
}

// Spans returns the spans received so far.
func (l *Listener) Spans() []otlptest.Span {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.spans)
}

func (l *Listener) receive(w http.ResponseWriter, r *http.Request) {
	var events []Event
	var spans []otlptest.Span
	err := checkAuth(r)
	if err == nil && strings.Contains(r.URL.Path, "/otlp/") {
		spans, err = otlptest.Read(r, "/api/42/integration/otlp/v1/traces/")
	} else if err == nil {
		events, err = read(r)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.problems = append(l.problems, err)
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	l.events = append(l.events, events...)
	if l.spans = append(l.spans, spans...); len(spans) > 0 {
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		return
	}
	_, _ = io.WriteString(w, "{}")
}

func checkAuth(r *http.Request) error {
	if auth := r.Header.Get("X-Sentry-Auth"); !strings.Contains(auth, "sentry_key=public") || r.Header.Get("Authorization") != "" {
		return fmt.Errorf("unexpected X-Sentry-Auth or Authorization: %q", auth)
	}
	return nil
}

// read parses an envelope: https://develop.sentry.dev/sdk/data-model/envelopes/
func read(r *http.Request) (events []Event, err error) {
	if r.Method != http.MethodPost || r.URL.Path != "/api/42/envelope/" {
		return nil, fmt.Errorf("%s %s is not an envelope", r.Method, r.URL.Path)
	}
	if encoding := r.Header.Get("Content-Encoding"); encoding != "" { // sentry-go uses no encoding
		return nil, fmt.Errorf("the envelope has an unsupported encoding: %s", encoding)
	}
	body := bufio.NewReader(r.Body)
	if _, err := body.ReadBytes('\n'); err != nil {
		return nil, fmt.Errorf("read the envelope's header: %w", err)
	}
	for {
		line, err := body.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(bytes.TrimSpace(line)) == 0 {
			return events, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read an item's header: %w", err)
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		var header struct {
			Type   string `json:"type"`
			Length int    `json:"length"`
		}
		if err := json.Unmarshal(line, &header); err != nil {
			return nil, fmt.Errorf("read an item's header: %w", err)
		}
		payload := make([]byte, header.Length)
		if _, err := io.ReadFull(body, payload); err != nil {
			return nil, fmt.Errorf("read a %s: %w", header.Type, err)
		}
		if header.Type != "event" && header.Type != "transaction" {
			continue // a report of the client about its own state
		}
		event := Event{Raw: payload}
		if err := json.Unmarshal(payload, &event); err != nil {
			return nil, fmt.Errorf("read a %s: %w", header.Type, err)
		}
		events = append(events, event)
	}
}
