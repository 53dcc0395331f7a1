package page

import (
	"context"
	"errors"
	"net/http"
	"slices"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// listedBatches is the number of batches that the list shows.
const listedBatches = 100

type batchesView struct {
	State   store.BatchState
	States  []store.BatchState
	Batches []store.BatchInfo
	More    bool
}

func (p *Page) batches(w http.ResponseWriter, r *http.Request) {
	view := batchesView{State: store.BatchState(r.FormValue("state")), States: store.BatchStates()}
	if view.State != "" && !slices.Contains(view.States, view.State) {
		p.fail(w, r, notFoundError("This state does not exist."))
		return
	}
	if !p.within(w, r, readTimeout, func(ctx context.Context) (err error) {
		view.Batches, err = p.o.Store.Batches(ctx, view.State, listedBatches+1)
		return err
	}) {
		return
	}
	view.More = len(view.Batches) > listedBatches
	view.Batches = view.Batches[:min(listedBatches, len(view.Batches))]
	p.render(w, r, http.StatusOK, "batches", view)
}

func (p *Page) batch(w http.ResponseWriter, r *http.Request) {
	id, err := uuid.Parse(r.PathValue("id"))
	if err != nil {
		p.fail(w, r, store.ErrNoBatch)
		return
	}
	var batch store.BatchInfo
	if p.within(w, r, readTimeout, func(ctx context.Context) (err error) {
		batch, err = p.o.Store.Batch(ctx, id)
		return err
	}) {
		p.render(w, r, http.StatusOK, "batch", batch)
	}
}

func (p *Page) changeBatch(action string, change func(*store.Store, context.Context, string, uuid.UUID) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id, err := uuid.Parse(r.PathValue("id"))
		if err != nil {
			p.fail(w, r, store.ErrNoBatch)
			return
		}
		p.act(w, r, action, "/batches", func(ctx context.Context) error { return change(p.o.Store, ctx, operator(r), id) })
	}
}

// notFoundError is the text of a page that does not exist.
type notFoundError string

// Error implements error.
func (e notFoundError) Error() string { return string(e) }

// fail shows an error.
func (p *Page) fail(w http.ResponseWriter, r *http.Request, err error) {
	code, text := http.StatusServiceUnavailable, err.Error()
	missing, isMissing := errors.AsType[notFoundError](err)
	switch {
	case errors.Is(err, store.ErrNoBatch):
		code, text = http.StatusNotFound, "This batch does not exist. It may have been delivered."
	case errors.Is(err, store.ErrNoDeadLetter):
		code, text = http.StatusNotFound, "This dead letter does not exist. It may have been retried or discarded."
	case isMissing:
		code, text = http.StatusNotFound, string(missing)
	case errors.Is(err, context.DeadlineExceeded):
		text = "PostgreSQL has not answered in time. Whether an action had an effect is unknown: look before you repeat it."
	}
	p.render(w, r, code, "error", text)
}
