package page

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"html/template"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/relay/status"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// listedLetters is the number of dead letters of a page.
const listedLetters = 50

// search is the form with which an operator selects dead letters. Its fields are those of
// the URL.
type search struct {
	Type, Environment, Error, Since, Until, Event, Batch string
	Before                                               int64
}

func readSearch(r *http.Request) search {
	get := func(name string) string { return strings.TrimSpace(r.FormValue(name)) }
	before, _ := strconv.ParseInt(get("before"), 10, 64) // an invalid page is the first page
	return search{
		Type: get("type"), Environment: get("environment"), Error: get("error"), Since: get("since"), Until: get("until"),
		Event: get("event"), Batch: get("batch"), Before: max(0, before),
	}
}

// Given returns whether a field selects dead letters.
func (s search) Given() bool { s.Before = 0; return s != search{} }

// Page returns the URL of the dead letters of the search below an id.
func (s search) Page(before int64) template.URL {
	values := url.Values{}
	for name, value := range map[string]string{
		"type": s.Type, "environment": s.Environment, "error": s.Error, "since": s.Since, "until": s.Until, "event": s.Event, "batch": s.Batch,
	} {
		if value != "" {
			values.Set(name, value)
		}
	}
	if before > 0 {
		values.Set("before", strconv.FormatInt(before, 10))
	}
	return template.URL("/dead-letters?" + values.Encode()) //nolint:gosec // the values are encoded
}

// filter returns the filter of the search. fixed is the search with times instead of ages,
// so that it selects the same dead letters later.
func (s search) filter() (filter store.DeadLetterFilter, fixed search, err error) {
	filter = store.DeadLetterFilter{EventType: s.Type, Environment: s.Environment, Error: s.Error, Before: s.Before}
	for _, field := range []struct {
		label string
		text  *string
		into  *time.Time
	}{{"Since", &s.Since, &filter.Since}, {"Until", &s.Until, &filter.Until}} {
		if *field.text == "" {
			continue
		}
		if *field.into, err = status.ParseTime(*field.text); err != nil {
			return filter, s, fmt.Errorf("%s %w", field.label, err)
		}
		*field.text = field.into.UTC().Format(time.RFC3339)
	}
	if s.Event != "" {
		id, err := uuid.Parse(s.Event)
		if err != nil {
			return filter, s, errors.New("Event ID must be a UUID") //nolint:staticcheck // a sentence of the page
		}
		filter.EventIDs = []uuid.UUID{id}
	}
	if s.Batch != "" {
		if filter.BatchID, err = uuid.Parse(s.Batch); err != nil {
			return filter, s, errors.New("Batch ID must be a UUID") //nolint:staticcheck // a sentence of the page
		}
	}
	return filter, s, nil
}

type lettersView struct {
	Search  search
	Error   string // of the search
	Letters []store.DeadLetter
	// More is the number of older letters, and Next the lowest id of Letters.
	More      int
	Next      int64
	All       int // on this page and older
	FuseBlown bool
}

func (p *Page) deadLetters(w http.ResponseWriter, r *http.Request) {
	view := lettersView{Search: readSearch(r), FuseBlown: p.o.Store.Fuse() != nil}
	filter, _, err := view.Search.filter()
	if err != nil {
		view.Error = err.Error() + "."
		p.render(w, r, http.StatusUnprocessableEntity, "deadletters", view)
		return
	}
	if !p.within(w, r, readTimeout, func(ctx context.Context) (err error) {
		view.Letters, view.More, err = p.o.Store.DeadLetters(ctx, filter, listedLetters)
		return err
	}) {
		return
	}
	view.All = view.More + len(view.Letters)
	if view.More > 0 {
		view.Next = view.Letters[len(view.Letters)-1].ID
	}
	p.render(w, r, http.StatusOK, "deadletters", view)
}

func (p *Page) deadLetter(w http.ResponseWriter, r *http.Request) {
	id, err := strconv.ParseInt(r.PathValue("id"), 10, 64)
	if err != nil {
		p.fail(w, r, store.ErrNoDeadLetter)
		return
	}
	var letter store.DeadLetter
	if p.within(w, r, readTimeout, func(ctx context.Context) (err error) {
		letter, err = p.o.Store.DeadLetter(ctx, id)
		return err
	}) {
		p.logAction(r, "dead_letter_show", "dead_letter_id", id) // a payload can hold personal data
		p.render(w, r, http.StatusOK, "deadletter", letter)
	}
}

// letterChange is an action on dead letters.
type letterChange struct {
	Name, Done string // retry, retried
	action     string
	apply      func(*store.Store, context.Context, []int64) iter.Seq2[[]store.DeadLetterKey, error]
}

var letterChanges = map[string]letterChange{
	"retry":   {"retry", "retried", store.ActionRequeueDeadLetters, (*store.Store).RequeueDeadLetters},
	"discard": {"discard", "discarded", store.ActionDiscardDeadLetters, (*store.Store).DiscardDeadLetters},
}

// selection is what an operator has selected: ids, or all dead letters of a search up to
// an id.
type selection struct {
	Change letterChange
	All    bool
	IDs    []int64
	Search search
	// Count is the number of dead letters that the operator has confirmed.
	Count int
	Error string
}

// readSelection reads the selection of a form, and finds its dead letters.
func (p *Page) readSelection(ctx context.Context, r *http.Request) (s selection, err error) {
	change, known := letterChanges[r.PostFormValue("change")]
	if !known {
		return s, notFoundError("This action does not exist.")
	}
	s = selection{Change: change, All: r.PostFormValue("scope") == "all", Search: readSearch(r)}
	filter := store.DeadLetterFilter{IDs: []int64{}}
	if s.All {
		if filter, s.Search, err = s.Search.filter(); err != nil {
			return s, notFoundError(err.Error() + ".")
		}
	} else {
		for _, text := range r.PostForm["id"] {
			id, err := strconv.ParseInt(text, 10, 64)
			if err != nil {
				return s, store.ErrNoDeadLetter
			}
			filter.IDs = append(filter.IDs, id)
		}
	}
	if s.IDs, err = p.o.Store.DeadLetterIDs(ctx, filter); err != nil {
		return s, err
	}
	s.Count = len(s.IDs)
	if s.All && s.Count > 0 {
		s.Search.Before = s.IDs[s.Count-1] + 1 // dead letters that are added meanwhile are not selected
	}
	return s, nil
}

func (p *Page) confirmDeadLetters(w http.ResponseWriter, r *http.Request) {
	var selected selection
	if p.within(w, r, readTimeout, func(ctx context.Context) (err error) {
		selected, err = p.readSelection(ctx, r)
		return err
	}) {
		p.render(w, r, http.StatusOK, "confirm", selected)
	}
}

// changeDeadLetters retries or discards the confirmed dead letters. The response grows
// with the progress. If the operator leaves the page, the rest stays as it is.
func (p *Page) changeDeadLetters(w http.ResponseWriter, r *http.Request) {
	var selected selection
	if !p.within(w, r, actTimeout, func(ctx context.Context) (err error) {
		if selected, err = p.readSelection(ctx, r); err != nil || selected.Count == 0 {
			return err
		}
		if selected.Change.Name == "discard" && r.PostFormValue("count") != strconv.Itoa(selected.Count) {
			selected.Error = fmt.Sprintf("Enter the number of dead letters, %d, to discard them.", selected.Count)
			return nil
		}
		return p.o.Store.AuditDeadLetters(ctx, operator(r), selected.Change.action, selected.IDs)
	}) {
		return
	}
	if selected.Error != "" || selected.Count == 0 {
		p.render(w, r, http.StatusUnprocessableEntity, "confirm", selected)
		return
	}
	p.logAction(r, selected.Change.action, "dead_letters", selected.Count, "first_id", selected.IDs[0], "last_id", selected.IDs[selected.Count-1])

	progress := letterProgress{Change: selected.Change, Of: selected.Count}
	connection := http.NewResponseController(w)
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("X-Accel-Buffering", "no")
	show := func(name string) bool {
		var part bytes.Buffer
		if err := p.execute(&part, r, name, progress); err != nil {
			p.log.ErrorContext(r.Context(), "rendering page failed", "template", name, "err", err)
			return false
		}
		_ = connection.SetWriteDeadline(time.Now().Add(streamTimeout))
		_, err := part.WriteTo(w)
		return err == nil && connection.Flush() == nil
	}
	if !show("changing") {
		return
	}
	err := p.query(r.Context(), func(ctx context.Context) error {
		shown := time.Now()
		for letters, err := range selected.Change.apply(p.o.Store, ctx, selected.IDs) {
			if err != nil {
				return err
			}
			progress.Changed += len(letters)
			if time.Since(shown) >= progressInterval {
				shown = time.Now()
				if !show("changed") {
					return context.Cause(ctx)
				}
			}
		}
		return nil
	})
	if err != nil {
		progress.Error = err.Error()
		p.log.WarnContext(r.Context(), "action of operator interrupted", "action", selected.Change.action, "changed", progress.Changed, "err", err)
	}
	show("finished")
}

// progressInterval is the time between two lines of progress.
const progressInterval = time.Second

// letterProgress is the progress of a change. Changed is lower than Of at the end if some
// dead letters were changed by somebody else.
type letterProgress struct {
	Change      letterChange
	Changed, Of int
	Error       string
}
