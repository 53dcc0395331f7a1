package relay

import (
	"context"
	"errors"
	"slices"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// deadLetterBadEvents moves the events that the sink can never store from the batch to
// the dead letters. The batch is absent from the sink: this attempt has sent nothing, and
// earlier attempts were resolved.
func (d *delivery) deadLetterBadEvents(ctx context.Context, bad *sink.BadEventsError) (string, error) {
	keys, err := d.lease.Keys(ctx)
	if err != nil {
		return "", err
	}
	causes := make(map[int]error, len(bad.Events))
	for _, event := range bad.Events {
		causes[event.Index] = event.Err
	}
	outcome, refused := refuse(keys, causes)
	allowed, err := d.lease.AllowDeadLetters(ctx, len(outcome.Refused))
	switch {
	case err != nil:
		return "", err
	case allowed:
		return d.deadLetter(ctx, refused, outcome)
	case len(outcome.Remaining) == 0:
		return d.keepRefused(ctx, bad)
	}
	// The other events do not wait for the fuse. The bad events get a new token, because
	// no insert can contain them.
	outcome.Refused, outcome.Parts = nil, [][]int64{refused.ID}
	if err := d.lease.Shrink(ctx, outcome, bad); err != nil {
		return "", err
	}
	d.checkFuse(ctx)
	d.work.send(1)
	return resultSplit, nil
}

// refuse returns the outcome of a batch whose events are absent, and its refused events.
// causes has the reason for each event that becomes a dead letter, by its index.
func refuse(keys *store.Events, causes map[int]error) (store.Outcome, *store.Events) {
	var (
		outcome store.Outcome
		refused []int
	)
	for i, id := range keys.ID {
		if cause, isBad := causes[i]; isBad {
			outcome.Refused = append(outcome.Refused, store.Refused{ID: id, Cause: cause})
			refused = append(refused, i)
		} else {
			outcome.Remaining = append(outcome.Remaining, id)
		}
	}
	return outcome, keys.Select(refused)
}

// deadLetter moves the refused events to the dead letters. The remaining events stay in
// the batch. The fuse has allowed it.
func (d *delivery) deadLetter(ctx context.Context, refused *store.Events, outcome store.Outcome) (string, error) {
	cause := outcome.Refused[0].Cause
	if err := d.lease.Shrink(ctx, outcome, cause); err != nil {
		return "", err
	}
	n := len(outcome.Refused)
	d.metrics.events.WithLabelValues(resultDeadLettered).Add(float64(n))
	d.logWithTraces(refused).ErrorContext(ctx, "events dead-lettered", "dead_lettered", n, "err", cause)
	d.work.send(1)
	return resultSplit, nil
}

// deadLetterOne moves one event of an absent batch to the dead letters, if the fuse
// allows it.
func (d *delivery) deadLetterOne(ctx context.Context, keys *store.Events, index int, cause error) (string, error) {
	allowed, err := d.lease.AllowDeadLetters(ctx, 1)
	if err != nil {
		return "", err
	}
	if !allowed {
		return d.keepRefused(ctx, cause)
	}
	outcome, refused := refuse(keys, map[int]error{index: cause})
	outcome.Failing = true
	return d.deadLetter(ctx, refused, outcome)
}

// keepRefused keeps the batch in the outbox, because the fuse has blown.
func (d *delivery) keepRefused(ctx context.Context, cause error) (string, error) {
	d.checkFuse(ctx)
	return d.retryAfter(ctx, d.lease.Fail, cause, d.backoff.delay(d.lease.Attempts))
}

const (
	// withoutEvidence is the multiple of DeadLetterAfter after which an attempt counts
	// without evidence against the event.
	withoutEvidence = 10
	// brokenAfter is the multiple of DeadLetterAfter for which no event of a type may have
	// been delivered before the type is put into quarantine. The last bad events of a type
	// that the sink takes become dead letters before.
	brokenAfter = 2 * withoutEvidence
)

// convict decides about an event that the sink did not take although it was inserted
// alone. An event that the sink refuses by a rule becomes a dead letter at once. Any other
// event becomes a dead letter after enough attempts and enough time. An attempt
// counts only with evidence against the event. Without evidence it counts after a long
// time, because the sink passes its check, and the fuse bounds the damage.
func (d *delivery) convict(ctx context.Context, keys *store.Events, index int, cause error) (string, error) {
	if failure, ok := errors.AsType[sinkError](cause); ok {
		cause = failure.error
	}
	if sink.ClassOf(cause) == sink.Permanent {
		return d.deadLetterOne(ctx, keys, index, cause)
	}
	kind := kindOf(keys, index)
	isCause := d.evidence.against(kind, keys.ID[index], d.previousAttempt())
	if d.evidence.isBroken(kind, brokenAfter*d.o.DeadLetterAfter) {
		if err := d.quarantine(ctx, kind.eventType, cause); err != nil {
			return "", err
		}
	}
	isQuarantined := !slices.ContainsFunc(keys.EventType.Values, func(eventType string) bool { return !d.o.Store.IsQuarantined(eventType) })
	switch age := d.lease.Age(); {
	case !isCause && isQuarantined:
		d.log.WarnContext(ctx, "batch held in quarantine", "err", cause)
		if err := d.lease.Hold(ctx, cause); err != nil {
			return "", err
		}
		return resultRetried, nil
	case !isCause && age < withoutEvidence*d.o.DeadLetterAfter:
		delay := d.backoff.delay(d.lease.Attempts)
		d.log.WarnContext(ctx, "batch failed again", "err", cause, "delay", delay, "failures", d.lease.Failures)
		return d.retryAfter(ctx, d.lease.Retry, cause, delay)
	case d.lease.Failures < d.o.DeadLetterAttempts, age < d.o.DeadLetterAfter:
		return "", sinkError{cause}
	}
	return d.deadLetterOne(ctx, keys, index, cause)
}
