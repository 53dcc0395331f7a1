package relay

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

const (
	// tidyInterval is the time between two turns of the housekeeping.
	tidyInterval = time.Minute
	// tidyEvents is the number of delivered events after which this relay does not wait for
	// the next turn, so that dead rows are vacuumed while they are few.
	tidyEvents = 50_000
	// vacuumPause is the least time between two vacuums of the fleet, and retentionPause the
	// time between two deletions of old rows. failedPause is the time after a failure, such as
	// a vacuum that has exceeded statement_timeout. Autovacuum has no such limit.
	vacuumPause    = 2 * time.Second
	retentionPause = time.Hour
	failedPause    = time.Hour
)

// housekeeping is the state of this relay's part in the fleet's housekeeping.
type housekeeping struct {
	delivered atomic.Int64 // events since the last turn
	runs      *prometheus.CounterVec
	deleted   *prometheus.CounterVec

	mu      sync.Mutex
	horizon float64 // seconds
	// unseen is the oldest snapshot whose age PostgreSQL does not show, and since the first
	// look that has found it.
	unseen string
	since  time.Time

	// The goroutine of tidyUntil uses these fields.
	failed map[store.Task]bool // logged failures
	hinted bool                // logged that the role may not vacuum
}

func newHousekeeping(registry prometheus.Registerer) *housekeeping {
	h := &housekeeping{
		failed: map[store.Task]bool{},
		runs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "diehard_relay_housekeeping_runs_total",
			Help: "Tasks of the fleet's housekeeping that this relay has done, by result: done, failed.",
		}, []string{"task", "result"}),
		deleted: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "diehard_relay_housekeeping_deleted_rows_total",
			Help: "Rows that this relay has deleted because they were older than their retention.",
		}, []string{"task"}),
	}
	registry.MustRegister(h.runs, h.deleted, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "diehard_postgresql_horizon_age_seconds",
		Help: "Age of the oldest snapshot that keeps dead rows of the database, at the last look, at most a minute ago.",
	}, h.horizonSeconds))
	return h
}

// horizonSeconds returns the age of the oldest snapshot at the last look.
func (h *housekeeping) horizonSeconds() float64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.horizon
}

// tidyUntil does the housekeeping of the fleet until ctx ends. The delivery does not depend
// on it.
func (r *Relay) tidyUntil(ctx context.Context) error {
	looks := time.NewTicker(time.Second)
	defer looks.Stop()
	var last time.Time
	for {
		r.turned(loopTidy)
		if time.Since(last) >= tidyInterval || r.tidy.delivered.Load() >= tidyEvents {
			last = time.Now()
			r.tidy.delivered.Store(0)
			if err := r.tidyOnce(ctx); err != nil && ctx.Err() == nil {
				r.log.DebugContext(ctx, "housekeeping failed", "err", err) // the cutter reports an outage
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller has ended ctx
		case <-looks.C:
		}
	}
}

// tasks returns the tasks that this relay takes part in.
func (r *Relay) tasks() (tasks []store.Task) {
	for _, task := range []struct {
		task store.Task
		on   bool
	}{
		{store.TaskVacuum, r.o.Vacuum},
		{store.TaskDeadLetters, r.o.DeadLetterRetention > 0},
		{store.TaskAudit, r.o.AuditRetention > 0},
	} {
		if task.on {
			tasks = append(tasks, task.task)
		}
	}
	return tasks
}

func (r *Relay) tidyOnce(ctx context.Context) error {
	dead, err := r.o.Store.DeadRows(ctx)
	if err != nil {
		return err
	}
	r.tidy.look(dead, time.Now())
	tasks := slices.DeleteFunc(r.tasks(), func(task store.Task) bool { return task == store.TaskVacuum && !dead.Due() })
	if r.o.Vacuum && !dead.MayVacuum && !r.tidy.hinted {
		r.tidy.hinted = true
		r.log.InfoContext(ctx, "vacuum left to autovacuum",
			"hint", "outbox_events stays smaller if the role may vacuum it: see housekeeping.vacuum in docs/configuration.md")
	}
	leased, err := r.o.Store.LeaseTasks(ctx, r.o.Member.ID, tasks)
	if err != nil {
		return err
	}
	for _, task := range leased {
		err := r.do(ctx, task, dead)
		if ctx.Err() != nil {
			return r.giveBack(ctx, task)
		}
		r.tidied(ctx, task, err)
		if err != nil {
			if err := r.o.Store.EndTask(ctx, r.o.Member.ID, task, failedPause, false); err != nil {
				return err
			}
		}
	}
	return nil
}

// giveBack ends the lease of a task that a stop has interrupted. If PostgreSQL is
// unavailable, the lease ends by itself.
func (r *Relay) giveBack(ctx context.Context, task store.Task) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reportTimeout)
	defer cancel()
	return r.o.Store.EndTask(ctx, r.o.Member.ID, task, 0, false)
}

// do does a task and ends its lease, unless it fails.
func (r *Relay) do(ctx context.Context, task store.Task, dead store.DeadRows) error {
	pause := retentionPause
	var deleted int64
	var err error
	switch task {
	case store.TaskVacuum:
		return r.o.Store.Vacuum(ctx, r.o.Member.ID, dead, vacuumPause)
	case store.TaskDeadLetters:
		deleted, err = r.o.Store.DeleteDeadLetters(ctx, r.o.DeadLetterRetention)
		if deleted > 0 {
			r.log.WarnContext(ctx, "old dead letters deleted", "dead_letters", deleted, "older_than", r.o.DeadLetterRetention)
		}
	case store.TaskAudit:
		deleted, err = r.o.Store.DeleteAudit(ctx, r.o.AuditRetention)
	}
	r.tidy.deleted.WithLabelValues(string(task)).Add(float64(deleted))
	if err != nil {
		return err
	}
	return r.o.Store.EndTask(ctx, r.o.Member.ID, task, pause, true)
}

// tidied records the result of a task. It logs a failure once, until the task succeeds.
func (r *Relay) tidied(ctx context.Context, task store.Task, err error) {
	result := "done"
	if err != nil {
		result = "failed"
		if !r.tidy.failed[task] {
			r.log.WarnContext(ctx, "housekeeping failed", "task", task, "err", err)
		}
	}
	r.tidy.failed[task] = err != nil
	r.tidy.runs.WithLabelValues(string(task), result).Inc()
}

// look records the age of the oldest snapshot. PostgreSQL does not show the age of the
// snapshots of other roles, so the age counts from the first look.
func (h *housekeeping) look(dead store.DeadRows, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.horizon = dead.HorizonSeconds
	if dead.UnseenHolder == "" {
		h.unseen = ""
		return
	}
	if h.unseen != dead.UnseenHolder {
		h.unseen, h.since = dead.UnseenHolder, now
	}
	h.horizon = max(h.horizon, now.Sub(h.since).Seconds())
}
