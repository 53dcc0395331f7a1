package relay

import (
	"context"
	"errors"
	"slices"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// isSuspected returns whether some events of the batch may be the cause of its failures.
// Only the sink can tell: it takes a sample of the batch, and not the whole. While the sink
// is undecided, the batch is not sampled: after a sample, the sink knows the token, and
// another insert of the batch would not let it decide about other rows.
func (d *delivery) isSuspected() bool { return d.lease.Failures > 0 && !d.isUndecided() }

// sample inserts some events of an absent batch under the token of the batch. An earlier
// insert of the whole batch may still begin late, for example in a proxy. It would double
// events that have left the token. If the sink has recorded the token for the sample, it
// refuses the late insert in the partitions of the sample. The other events of these
// partitions then form new batches with new tokens. Events of other partitions keep the
// token. failure is the error of the whole batch.
func (d *delivery) sample(ctx context.Context, keys *store.Events, failure error) (string, error) {
	if err := d.checkSink(ctx); err != nil {
		return "", err
	}
	partitions, err := d.partitions(ctx, keys)
	if err != nil {
		return "", err
	}
	chosen := d.choose(keys, partitions)
	events, err := d.lease.ReadSome(ctx, keys.IDs(chosen))
	if err != nil {
		return "", err
	}
	cause := d.insert(ctx, events)
	failpoint.At(failpoint.SampleEnded)
	if bad, ok := errors.AsType[*sink.BadEventsError](cause); ok {
		for i := range bad.Events {
			bad.Events[i].Index = chosen[bad.Events[i].Index]
		}
		return d.deadLetterBadEvents(ctx, bad)
	}
	if cause != nil && !mayBeData(cause) {
		return "", cause
	}
	present, absent, err := d.outcome(ctx, keys, failpoint.SampleWaited, failpoint.SampleChecked)
	if err != nil {
		return "", err
	}
	if cause != nil && len(present) > 0 {
		d.reportFailedInsert(ctx, keys.Select(present), cause)
	}
	if d.o.Sink.Undecided() && slices.ContainsFunc(present, func(i int) bool { return cause != nil || !slices.Contains(chosen, i) }) {
		return "", sinkError{errUndecided} // an earlier insert has stored these rows
	}
	covered := map[int]bool{} // the partitions in which the sink has recorded the token
	if !d.lease.Unverified {  // otherwise another token may have stored the events
		for _, i := range present {
			covered[partitions[i]] = true
		}
	}
	if cause == nil {
		for _, i := range chosen {
			covered[partitions[i]] = true
		}
	}
	switch {
	case len(absent) == 0:
		return d.settleResolved(ctx, keys)
	case len(covered) > 0:
		return d.part(ctx, keys, failure, present, absent, func(i int) bool { return covered[partitions[i]] })
	case len(present) > 0:
		return d.settlePresent(ctx, keys, present, absent)
	case len(chosen) == 1:
		return d.convict(ctx, keys, chosen[0], cause)
	}
	return "", cause
}

// mayBeData returns whether the data of the inserted events may have caused the error.
func mayBeData(err error) bool {
	if _, fromSink := errors.AsType[sinkError](err); !fromSink {
		return false
	}
	switch sink.ClassOf(err) {
	case sink.Unknown, sink.TooLarge, sink.Permanent:
		return true
	default:
		return false
	}
}

// partitions returns the partition of each event.
func (d *delivery) partitions(ctx context.Context, keys *store.Events) ([]int, error) {
	if len(keys.ID) == 1 {
		return []int{0}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, d.o.FlushTimeout)
	defer cancel()
	partitions, err := d.o.Sink.Partitions(ctx, &keys.Keys)
	if err != nil {
		return nil, sinkError{err}
	}
	return partitions, nil
}

const (
	// maxSample bounds the events of a sample. If the sink cannot tell the partitions of
	// events, each event counts as its own partition.
	maxSample = 100
	// stride is a prime number, so that the samples of successive attempts are far apart.
	stride = 7919
)

// choose returns the indexes of a sample: an event of each partition, or a single event
// after another failure. Each attempt chooses another event type and another event. Types
// in quarantine are chosen only if a partition has no others.
func (d *delivery) choose(keys *store.Events, partitions []int) []int {
	types := map[int][]uint32{}          // the types of each partition
	events := map[int]map[uint32][]int{} // the events of each partition by their type
	var order []int
	for i, partition := range partitions {
		if events[partition] == nil {
			events[partition] = map[uint32][]int{}
			order = append(order, partition)
		}
		eventType := keys.EventType.Indexes[i]
		if events[partition][eventType] == nil {
			types[partition] = append(types[partition], eventType)
		}
		events[partition][eventType] = append(events[partition][eventType], i)
	}
	attempt := d.lease.Attempts
	if d.lease.Failures > 1 {
		first := attempt % len(order)
		attempt /= len(order)
		order = order[first : first+1]
	}
	order = order[:min(len(order), maxSample)]
	chosen := make([]int, len(order))
	for n, partition := range order {
		candidates := slices.DeleteFunc(slices.Clone(types[partition]), func(eventType uint32) bool {
			return d.o.Store.IsQuarantined(keys.EventType.Values[eventType])
		})
		if len(candidates) == 0 {
			candidates = types[partition]
		}
		ofType := events[partition][candidates[attempt%len(candidates)]]
		chosen[n] = ofType[attempt/len(candidates)*stride%len(ofType)]
	}
	slices.Sort(chosen)
	return chosen
}

// part settles the events that are present, and moves the absent events that isCovered
// selects to new batches.
func (d *delivery) part(
	ctx context.Context, keys *store.Events, failure error, present, absent []int, isCovered func(int) bool,
) (string, error) {
	var covered, rest []int
	for _, i := range absent {
		if isCovered(i) {
			covered = append(covered, i)
		} else {
			rest = append(rest, i)
		}
	}
	outcome := store.Outcome{Delivered: keys.IDs(present), Remaining: keys.IDs(rest), Failing: true}
	for _, part := range d.parts(keys, covered) {
		outcome.Parts = append(outcome.Parts, keys.IDs(part))
	}
	if err := d.inSettleSpan(ctx, len(present), func(ctx context.Context) error { return d.lease.Shrink(ctx, outcome, failure) }); err != nil {
		return "", err
	}
	d.record(ctx, keys.Select(present))
	d.logWithTraces(keys).WarnContext(ctx, "splitting failed batch", "delivered", len(present), "split", len(covered), "err", failure)
	d.work.send(2)
	return resultSplit, nil
}

// partsOfBatch is the number of parts of a failed batch. With fewer parts, more attempts
// fail until a bad event is alone. With more parts, the inserts are smaller. A failed
// attempt takes about ten times as long as an insert that succeeds.
const partsOfBatch = 4

// parts divides ascending indexes of events into up to four parts: by their event types if
// they have several, because most failures affect one type. Types in quarantine form one
// part. Events of a single type form parts of the same size.
func (d *delivery) parts(keys *store.Events, indexes []int) [][]int {
	const quarantined = 0
	order := map[uint32]int{} // of each type's first event
	others := 0
	for _, i := range indexes {
		eventType := keys.EventType.Indexes[i]
		if _, ok := order[eventType]; ok {
			continue
		}
		if d.o.Store.IsQuarantined(keys.EventType.Values[eventType]) {
			order[eventType] = quarantined
		} else {
			order[eventType] = 1 + others%(partsOfBatch-1)
			others++
		}
	}
	divided := make([][]int, partsOfBatch)
	for n, i := range indexes {
		part := n * partsOfBatch / len(indexes)
		if len(order) > 1 {
			part = order[keys.EventType.Indexes[i]]
		}
		divided[part] = append(divided[part], i)
	}
	return slices.DeleteFunc(divided, func(part []int) bool { return len(part) == 0 })
}
