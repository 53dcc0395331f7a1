// Package page serves the page of a relay for operators. The page says in one sentence
// whether events are delivered, since when not, and what to do. It shows the last hour,
// the fleet, the batches and the dead letters, and it has the actions that the commands
// of the relay have.
package page

import (
	"bytes"
	"context"
	"embed"
	"html/template"
	"log/slog"
	"math"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/relay"
	"github.com/diehard-outbox/diehard/pkg/relay/status"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// Options configure a Page. All fields but Token and MaxBacklogBytes are required.
type Options struct {
	Store *store.Store
	// ID is the relay's ID in the fleet.
	ID      uuid.UUID
	Version string
	// Ready returns nil if the relay delivers, otherwise the reason. Progress returns the
	// number of delivered events and their latency.
	Ready    func(context.Context) error
	Progress func() relay.Progress
	Log      *slog.Logger
	// Addr is the address of the listener. Without a Token, it must be a loopback address.
	Addr string
	// Token is what an operator needs to log in.
	Token string
	// MaxBacklogBytes is the size of the waiting events at which the API publishes no more,
	// or 0.
	MaxBacklogBytes int64
}

// Page is the page of a relay. It is an http.Handler.
type Page struct {
	o       Options
	log     *slog.Logger
	access  access
	handler http.Handler
	history history
	slots   chan struct{} // requests that use PostgreSQL, apart from snapshots
	streams chan struct{} // open pages
	stopped chan struct{} // closed when Run ends

	mu   sync.Mutex
	last *snapshot
}

const (
	// maxQueries bounds the requests that use PostgreSQL at a time. They share the relay's
	// connections.
	maxQueries = 2
	maxStreams = 32
	// readTimeout bounds the statements of one request, and actTimeout those of an action.
	readTimeout = 5 * time.Second
	actTimeout  = 30 * time.Second
	// freshTime is the time for which all open pages show the same snapshot.
	freshTime = 1500 * time.Millisecond

	livePath = "/live"
)

//go:embed templates assets
var files embed.FS

// New returns a Page.
func New(o Options) *Page {
	p := &Page{
		o: o, log: o.Log, access: access{token: o.Token, loopback: isLoopback(o.Addr)},
		slots: make(chan struct{}, maxQueries), streams: make(chan struct{}, maxStreams), stopped: make(chan struct{}),
	}
	p.handler = p.routes()
	return p
}

// ServeHTTP implements http.Handler.
func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) { p.handler.ServeHTTP(w, r) }

// Run samples the figures of the charts until ctx ends. It then ends the streams of open
// pages, so that the server can stop.
func (p *Page) Run(ctx context.Context) {
	defer close(p.stopped)
	samples := time.NewTicker(sampleInterval)
	defer samples.Stop()
	for {
		p.sample(ctx)
		select {
		case <-ctx.Done():
			return
		case <-samples.C:
		}
	}
}

func (p *Page) sample(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	backlog, size, age := math.NaN(), math.NaN(), math.NaN()
	if stats, err := p.o.Store.Stats(ctx); err == nil {
		backlog, size, age = float64(stats.BacklogEvents), float64(stats.BacklogBytes), stats.OldestSeconds
	}
	p.history.add(time.Now(), backlog, size, age, p.o.Progress())
}

func (p *Page) routes() http.Handler {
	pages := http.NewServeMux()
	pages.HandleFunc("GET /{$}", p.overview)
	pages.HandleFunc("GET "+livePath, p.live)
	pages.HandleFunc("GET /pause", p.confirmPause)
	pages.HandleFunc("POST /pause", p.pause)
	pages.HandleFunc("POST /resume", p.resume)
	pages.HandleFunc("GET /batches", p.batches)
	pages.HandleFunc("GET /batches/{id}", p.batch)
	pages.HandleFunc("POST /batches/{id}/retry", p.changeBatch(store.ActionRetryBatch, (*store.Store).RetryBatch))
	pages.HandleFunc("POST /batches/{id}/split", p.changeBatch(store.ActionSplitBatch, (*store.Store).SplitBatch))
	pages.HandleFunc("GET /dead-letters", p.deadLetters)
	pages.HandleFunc("GET /dead-letters/{id}", p.deadLetter)
	pages.HandleFunc("POST /dead-letters/confirm", p.confirmDeadLetters)
	pages.HandleFunc("POST /dead-letters/change", p.changeDeadLetters)
	pages.HandleFunc("POST /fuse/mend", p.mendFuse)

	all := http.NewServeMux()
	all.HandleFunc("GET /login", p.showLogin)
	all.HandleFunc("POST /login", p.login)
	all.HandleFunc("POST /logout", p.logout)
	for name, contentType := range map[string]string{
		"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml",
	} {
		all.HandleFunc("GET /"+name, serveFile("assets/"+name, contentType))
	}
	all.Handle("/", p.access.require(pages))
	// A form of another site sends no request in the name of the operator.
	return withHeaders(http.NewCrossOriginProtection().Handler(all))
}

func serveFile(name, contentType string) http.HandlerFunc {
	content, err := files.ReadFile(name)
	if err != nil {
		panic(err) // the file is embedded
	}
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.Header().Set("Cache-Control", "no-cache")
		_, _ = w.Write(content)
	}
}

var templates = template.Must(template.New("").Funcs(template.FuncMap{
	"count": func(n any) string { return status.Count(toInt(n)) }, "bytes": status.Bytes, "at": status.At,
	"seconds": func(s float64) string { return status.Duration(time.Duration(s * float64(time.Second))) },
	"ago":     func(at time.Time) string { return status.Duration(max(0, time.Since(at))) },
	"until":   until,
	"member":  status.Name, "words": words, "indent": indent, "lower": strings.ToLower,
	// An advice has commands between backquotes.
	"split": func(text string) []string { return strings.Split(text, "`") }, "odd": func(i int) bool { return i%2 == 1 },
}).ParseFS(files, "templates/*.html"))

// until returns the time until at, or an empty string if at is not in the future.
func until(at time.Time) string {
	left := time.Until(at)
	if left <= 0 {
		return ""
	}
	return status.Duration(left)
}

func toInt(n any) int64 {
	switch n := n.(type) {
	case int:
		return int64(n)
	case int64:
		return n
	case float64:
		return int64(math.Round(n))
	}
	return 0
}

// view is what every template gets.
type view struct {
	Title    string
	Operator string // empty if there is no login
	Version  string
	Data     any
}

// render answers with a page. It renders the whole page first, so that an error is not
// hidden in half a page.
func (p *Page) render(w http.ResponseWriter, r *http.Request, code int, name string, data any) {
	var body bytes.Buffer
	if err := p.execute(&body, r, name, data); err != nil {
		p.log.ErrorContext(r.Context(), "rendering page failed", "template", name, "err", err)
		http.Error(w, "The page could not be rendered. The log of the relay has the error.", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(code)
	_, _ = body.WriteTo(w)
}

// within calls do with a deadline when PostgreSQL is free for it, and shows its error.
func (p *Page) within(w http.ResponseWriter, r *http.Request, timeout time.Duration, do func(ctx context.Context) error) bool {
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	err := p.query(ctx, do)
	if err != nil {
		p.fail(w, r, err)
	}
	return err == nil
}

func (p *Page) query(ctx context.Context, do func(ctx context.Context) error) error {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
		return do(ctx)
	case <-ctx.Done():
		return ctx.Err() //nolint:wrapcheck // the caller's own error
	}
}
