package relay

import (
	"context"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

const (
	// reportInterval is the time between two reports of a relay to the fleet, if its state
	// does not change. A change is reported after changeInterval.
	reportInterval = 20 * time.Second
	changeInterval = time.Second
	// reportTimeout bounds a report, and the last report of a relay that stops.
	reportTimeout = 5 * time.Second
)

// reportUntil reports this relay to the fleet until ctx ends. The delivery does not depend
// on the reports: an error is logged once.
func (r *Relay) reportUntil(ctx context.Context) error {
	looks := time.NewTicker(changeInterval)
	defer looks.Stop()
	failing := false
	var reported store.MemberState
	var delivered uint64
	last := time.Now().Add(-reportInterval)
	for {
		r.turned(loopReport)
		if state := r.state(); time.Since(last) >= reportInterval || state.Ready != reported.Ready || state.Circuit != reported.Circuit {
			now := r.Progress().Events
			state.EventsPerSecond = float64(now-delivered) / time.Since(last).Seconds()
			err := r.report(ctx, state)
			reported, delivered, last = state, now, time.Now()
			if err != nil && !failing && ctx.Err() == nil && r.postgres.err() == nil {
				r.log.WarnContext(ctx, "relay missing from fleet", "err", err,
					"hint", "relay status does not show this relay; see the rights in docs/configuration.md")
			}
			failing = err != nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // the caller has ended ctx
		case <-looks.C:
		}
	}
}

func (r *Relay) report(ctx context.Context, state store.MemberState) error {
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	member := r.o.Member
	member.State = state
	return r.o.Store.Report(ctx, member)
}

// leave ends the reports. If PostgreSQL is unavailable, the row stays, and counts as a
// silent relay.
func (r *Relay) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), reportTimeout)
	defer cancel()
	if err := r.o.Store.Leave(ctx, r.o.Member.ID); err != nil {
		r.log.DebugContext(ctx, "leaving fleet failed", "err", err)
	}
}

// state returns what this relay does.
func (r *Relay) state() store.MemberState {
	state := store.MemberState{
		Busy: int(r.busy.Load()), Workers: r.o.Workers,
		Stopped: r.fault() != nil || r.watchdog.err() != nil, HorizonSeconds: r.tidy.horizonSeconds(),
	}
	state.Circuit, state.Since, state.NextProbe = r.circuit.look()
	if err := r.Ready(context.Background()); err != nil {
		state.Ready = err.Error()
	}
	return state
}
