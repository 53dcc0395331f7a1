package page

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sort"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/relay/status"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// snapshot is what the overview shows. If PostgreSQL is not available, it has only the
// status and the charts.
type snapshot struct {
	At        time.Time
	Status    status.Status
	Available bool
	// Ready is why this relay does not deliver, or empty.
	Ready string
	ID    uuid.UUID // of this relay
	// Growth says how fast the waiting events need more space, and when it ends. It is empty
	// if they do not.
	Growth  string
	Charts  []chart
	Batches []store.BatchInfo
	// MoreBatches is the number of batches that are not in Batches.
	MoreBatches int64
	LetterTypes []letterType
	// FuseBlown says that refused events do not become dead letters.
	FuseBlown bool
	Audit     []store.AuditRecord
}

// letterType is the number of dead letters of a type among the newest.
type letterType struct {
	Type  string
	Count int64
}

const (
	shownBatches = 10
	shownActions = 8
	shownTypes   = 5

	// streamInterval is the time between two updates of an open page.
	streamInterval = 2 * time.Second
	streamTimeout  = 10 * time.Second
)

// Class returns the class of the verdict in the style sheet.
func (s *snapshot) Class() string {
	switch {
	case !s.Status.Healthy:
		return "bad"
	case len(s.Status.Advice) > 0:
		return "warn"
	}
	return "good"
}

// States are the figures of the batches in the order of store.BatchStates.
func (s *snapshot) States() []batchState {
	states := make([]batchState, 0, len(s.Status.Batches))
	for _, state := range store.BatchStates() {
		states = append(states, batchState{state, s.Status.Batches[state]})
	}
	return states
}

type batchState struct {
	State store.BatchState
	store.BatchStats
}

// BatchCount is the number of batches in all states.
func (s *snapshot) BatchCount() int64 { return int64(len(s.Batches)) + s.MoreBatches }

// Differences are the settings that differ in the fleet.
func (s *snapshot) Differences() []string {
	if configurations := store.Configurations(store.Running(s.Status.Relays)); len(configurations) > 1 {
		return status.Differences(configurations)
	}
	return nil
}

// snapshot returns a snapshot that is at most freshTime old.
func (p *Page) snapshot(ctx context.Context) *snapshot {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last != nil && time.Since(p.last.At) < freshTime {
		return p.last
	}
	// Other pages show the snapshot too, so it does not end with one request.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readTimeout)
	defer cancel()
	s := &snapshot{ID: p.o.ID, Available: true}
	if err := p.o.Ready(ctx); err != nil {
		s.Ready = err.Error()
	}
	// The verdict does not wait for an action that takes long.
	if err := p.read(ctx, s); err != nil {
		s.Status, s.Available = status.Unavailable(err), false
	}
	s.At = time.Now()
	samples := p.history.hour()
	s.Charts = newCharts(samples, s.At)
	s.Growth = describeGrowth(samples, s.Status.BacklogBytes, p.o.MaxBacklogBytes)
	p.last = s
	return s
}

// leastGrowth is the growth that is worth a text, in bytes per hour. A backlog that is
// delivered grows and shrinks by less.
const leastGrowth = 1e6

// describeGrowth returns a text about the growth of the waiting events, in an hour. limit is
// the size at which the API publishes no more, or 0.
func describeGrowth(samples []sample, waiting, limit int64) string {
	perHour, known := growth(samples)
	switch {
	case limit > 0 && waiting >= limit:
		return fmt.Sprintf("the bound of %s is reached: the API refuses events", status.Bytes(limit))
	case !known || perHour < leastGrowth:
		return ""
	case limit == 0:
		return status.Bytes(int64(perHour)) + " more per hour"
	}
	const most = 1000 * 24 // hours
	left := time.Duration(min(most, float64(limit-waiting)/perHour) * float64(time.Hour))
	return fmt.Sprintf("%s more per hour: the bound of %s is reached in %s", status.Bytes(int64(perHour)), status.Bytes(limit), status.Duration(left))
}

func (p *Page) read(ctx context.Context, s *snapshot) error {
	stats, err := p.o.Store.Stats(ctx)
	if err != nil {
		return err
	}
	pause, err := p.o.Store.ReadPause(ctx)
	if err != nil {
		return err
	}
	fleet, err := p.o.Store.Fleet(ctx)
	if err != nil {
		return err
	}
	if s.Batches, err = p.o.Store.Batches(ctx, "", shownBatches); err != nil {
		return err
	}
	if s.Audit, err = p.o.Store.AuditLog(ctx, shownActions); err != nil {
		return err
	}
	s.Status = status.New(stats, pause, fleet)
	s.MoreBatches = max(0, stats.BatchCount()-int64(len(s.Batches)))
	s.FuseBlown = p.o.Store.Fuse() != nil
	for name, n := range stats.DeadLetterTypes {
		s.LetterTypes = append(s.LetterTypes, letterType{name, n})
	}
	sort.Slice(s.LetterTypes, func(i, j int) bool {
		a, b := s.LetterTypes[i], s.LetterTypes[j]
		return a.Count > b.Count || a.Count == b.Count && a.Type < b.Type
	})
	s.LetterTypes = s.LetterTypes[:min(shownTypes, len(s.LetterTypes))]
	return nil
}

func (p *Page) overview(w http.ResponseWriter, r *http.Request) {
	p.render(w, r, http.StatusOK, "overview", p.snapshot(r.Context()))
}

// sections are the templates of the overview that an open page receives again when they
// change.
var sections = []string{"verdict", "figures", "charts", "fleet", "batches", "letters", "actions"}

// live streams the sections of the overview that have changed, as server-sent events with
// a JSON object: the HTML by the name of the section.
func (p *Page) live(w http.ResponseWriter, r *http.Request) {
	select {
	case p.streams <- struct{}{}:
		defer func() { <-p.streams }()
	default:
		http.Error(w, fmt.Sprintf("%d pages are open already.", maxStreams), http.StatusServiceUnavailable)
		return
	}
	connection := http.NewResponseController(w)
	_ = connection.SetReadDeadline(time.Time{})
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no") // for a proxy that buffers responses
	sent := map[string]string{}
	updates := time.NewTicker(streamInterval)
	defer updates.Stop()
	for {
		now := p.snapshot(r.Context())
		changed := map[string]string{}
		for _, name := range sections {
			var section bytes.Buffer
			if err := templates.ExecuteTemplate(&section, name, now); err != nil {
				p.log.ErrorContext(r.Context(), "rendering page failed", "template", name, "err", err)
				return
			}
			if text := section.String(); sent[name] != text {
				sent[name], changed[name] = text, text
			}
		}
		message, err := json.Marshal(map[string]any{"healthy": now.Status.Healthy, "verdict": now.Status.Verdict, "sections": changed})
		if err != nil {
			return // a map of strings has a JSON form
		}
		_ = connection.SetWriteDeadline(time.Now().Add(streamTimeout))
		if _, err := fmt.Fprintf(w, "data: %s\n\n", message); err != nil || connection.Flush() != nil {
			return // the page was closed
		}
		select {
		case <-r.Context().Done():
			return
		case <-p.stopped:
			return
		case <-updates.C:
		}
	}
}

func (p *Page) confirmPause(w http.ResponseWriter, r *http.Request) {
	p.render(w, r, http.StatusOK, "pause", nil)
}

func (p *Page) pause(w http.ResponseWriter, r *http.Request) {
	p.act(w, r, store.ActionPause, "/", func(ctx context.Context) error {
		_, err := p.o.Store.Pause(ctx, operator(r))
		return err
	})
}

func (p *Page) resume(w http.ResponseWriter, r *http.Request) {
	p.act(w, r, store.ActionResume, "/", func(ctx context.Context) error {
		_, err := p.o.Store.Resume(ctx, operator(r))
		return err
	})
}

func (p *Page) mendFuse(w http.ResponseWriter, r *http.Request) {
	p.act(w, r, store.ActionMendFuse, "/dead-letters", func(ctx context.Context) error {
		_, err := p.o.Store.MendFuse(ctx, operator(r))
		return err
	})
}

// act does an action of the operator, which the store writes into the audit table, and
// returns to a page.
func (p *Page) act(w http.ResponseWriter, r *http.Request, action, next string, do func(context.Context) error) {
	if !p.within(w, r, actTimeout, do) {
		return
	}
	p.logAction(r, action)
	p.mu.Lock()
	p.last = nil // the next page shows the effect
	p.mu.Unlock()
	http.Redirect(w, r, next, http.StatusSeeOther)
}

func (p *Page) logAction(r *http.Request, action string, attrs ...any) {
	p.log.InfoContext(r.Context(), "operator acted", append([]any{"action", action, "actor", operator(r)}, attrs...)...)
}

func (p *Page) execute(w io.Writer, r *http.Request, name string, data any) error {
	v := view{Title: titles[name], Version: p.o.Version, Data: data}
	if p.access.token != "" && name != "login" {
		v.Operator, _ = r.Context().Value(operatorKey{}).(string)
	}
	return templates.ExecuteTemplate(w, name+".html", v) //nolint:wrapcheck // the error names the template
}

var titles = map[string]string{
	"overview": "Overview", "login": "Log in", "pause": "Pause", "error": "Error", "batches": "Batches", "batch": "Batch",
	"deadletters": "Dead letters", "deadletter": "Dead letter", "confirm": "Confirm", "changing": "Dead letters",
}

// words returns a name as words.
func words(name any) string { return strings.ReplaceAll(fmt.Sprint(name), "_", " ") }

// indent returns JSON with one value on each line.
func indent(value json.RawMessage) string {
	var out bytes.Buffer
	if json.Indent(&out, value, "", "  ") != nil {
		return string(value)
	}
	return out.String()
}
