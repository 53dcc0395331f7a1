package conformance_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/conformance"
	"github.com/diehard-outbox/diehard/pkg/sink/internal/sample"
)

// fault is a promise that a memory breaks.
type fault string

const (
	changesValue      fault = "changes a value"
	cutsContext       fault = "cuts a context off"
	losesType         fault = "loses a type"
	storesOnce        fault = "stores an event once"
	losesRows         fault = "loses rows"
	acceptsAnyTime    fault = "accepts any time"
	acceptsMalformed  fault = "accepts malformed batches"
	classifiesNothing fault = "classifies nothing"
	ignoresTokens     fault = "ignores tokens"
	hashesRows        fault = "compares the rows of a token"
	forgetsMonths     fault = "ignores tokens of many partitions"
	mergesPartitions  fault = "says that partitions are one"
	forgetsTokens     fault = "forgets a token too early"
	seesNothing       fault = "sees no insert in flight"
	seesForever       fault = "sees inserts that have ended"
	findsNothing      fault = "finds nothing"
	findsFirst        fault = "finds only the first events"
	comparesIDs       fault = "compares ids only"
	findsAll          fault = "finds everything"
	forgetsAborted    fault = "forgets the token of an aborted insert"
	ignoresDeadlines  fault = "ignores deadlines"
	trustsTimers      fault = "trusts the timer of a deadline"
	hasManyTables     fault = "has a table on each server"
	lacksWindow       fault = "lacks a window"
)

// window is the number of tokens that a memory remembers.
const window = 300

// memory is a destination in memory. It keeps all promises of a sink, except for its fault.
type memory struct {
	fault fault

	mu      sync.Mutex
	rows    *sink.Events
	seen    []string // tokens with the partition
	running map[string]int
	slow    time.Duration
	refused string
}

func newMemory(f fault) *memory {
	return &memory{fault: f, rows: &sink.Events{}, running: map[string]int{}}
}

func (m *memory) harness() conformance.Harness {
	return conformance.Harness{
		Sink:   server{m, "1"},
		Others: []sink.Sink{server{m, "2"}},
		Stored: func(_ context.Context, ids []uuid.UUID) (*sink.Events, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			return sample.Filter(m.rows, ids), nil
		},
		Slow: func(_ context.Context, d time.Duration) (conformance.Restore, error) {
			m.set(func() { m.slow = d })
			return func(context.Context) error { m.set(func() { m.slow = 0 }); return nil }, nil
		},
		Refuse: func(_ context.Context, eventType string) (conformance.Restore, error) {
			m.set(func() { m.refused = eventType })
			return func(context.Context) error { m.set(func() { m.refused = "" }); return nil }, nil
		},
		Window:   window,
		Patience: time.Second,
		Slowness: 100 * time.Millisecond,
	}
}

func (m *memory) set(change func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change()
}

// server is a sink on a memory.
type server struct {
	*memory

	name string
}

var _ sink.Sink = server{}

// Insert implements sink.Sink.
func (s server) Insert(ctx context.Context, batch sink.Batch) error {
	if deadline, ok := ctx.Deadline(); ok && s.fault != ignoresDeadlines && (ctx.Err() != nil || time.Now().After(deadline) && s.fault != trustsTimers) {
		return &sink.Error{Class: sink.Unavailable, Err: context.DeadlineExceeded}
	}
	if err := s.validate(batch); err != nil {
		return err
	}
	s.set(func() { s.running[batch.Token]++ })
	if s.fault == ignoresDeadlines {
		ctx = context.WithoutCancel(ctx)
	}
	executed := make(chan struct{})
	go func() { // the server continues if the client goes
		defer close(executed)
		s.mu.Lock()
		slow := s.slow
		s.mu.Unlock()
		time.Sleep(slow)
		s.set(func() {
			s.store(batch, ctx.Err() != nil)
			if s.fault != seesForever {
				s.running[batch.Token]--
			}
		})
	}()
	select {
	case <-executed:
		return nil
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return &sink.Error{Class: sink.Unavailable, Err: ctx.Err()}
		}
		return ctx.Err()
	}
}

func (s server) validate(batch sink.Batch) error {
	e := batch.Events
	n := e.Len()
	malformed := batch.Token == "" || n == 0 || e.EventType.Len() != n || len(e.EventDateTime) != n || e.Environment.Len() != n ||
		e.EventContext.Len() != n || len(e.MetadataVersion) != n
	if malformed {
		if s.fault == acceptsMalformed && batch.Token == "" {
			return nil
		}
		return errors.New("malformed")
	}
	bad := &sink.BadEventsError{}
	for i, at := range e.EventDateTime {
		if !storable(at) && s.fault != acceptsAnyTime {
			bad.Events = append(bad.Events, sink.BadEvent{Index: i, Err: errors.New("unstorable")})
		}
		if s.refused != "" && e.EventType.At(i) == s.refused {
			if s.fault == classifiesNothing {
				return errors.New("refused")
			}
			return &sink.Error{Class: sink.Permanent, Err: errors.New("refused")}
		}
	}
	if bad.Events != nil {
		return &sink.Error{Class: sink.Permanent, Err: bad}
	}
	return nil
}

func storable(at int64) bool {
	year := time.UnixMicro(at).UTC().Year()
	return year >= 1 && year <= 9999
}

func partition(at int64) string { return time.UnixMicro(at).UTC().Format("200601") }

// store adds the rows whose partitions have not seen the token.
func (s server) store(batch sink.Batch, aborted bool) {
	e := batch.Events
	adds := map[string]bool{}
	for i, at := range e.EventDateTime {
		key := batch.Token + " " + partition(at)
		if s.fault == hashesRows {
			key += e.EventID[i].String()
		}
		if _, ok := adds[key]; ok {
			continue
		}
		adds[key] = !slices.Contains(s.seen, key) || s.fault == ignoresTokens
	}
	for key, isNew := range adds {
		switch {
		case !isNew, aborted && s.fault == forgetsAborted, len(adds) > 100 && s.fault == forgetsMonths:
		default:
			s.seen = append(s.seen, key)
		}
	}
	remembered := window
	if s.fault == forgetsTokens {
		remembered--
	}
	s.seen = s.seen[max(0, len(s.seen)-remembered):]
	for i, at := range e.EventDateTime {
		key := batch.Token + " " + partition(at)
		if s.fault == hashesRows {
			key += e.EventID[i].String()
		}
		lost := s.fault == losesRows && i == 250 || s.fault == storesOnce && slices.Contains(s.rows.EventID, e.EventID[i])
		if adds[key] && !lost {
			s.add(e, i)
		}
	}
}

func (s server) add(e *sink.Events, i int) {
	sample.AppendFrom(s.rows, e, i)
	last := s.rows.Len() - 1
	switch {
	case s.fault == changesValue:
		s.rows.MetadataVersion[last]++
	case s.fault == cutsContext && i == 1:
		s.rows.EventContext.Ends[last]--
	case s.fault == losesType && i == 65_535:
		s.rows.EventType.Indexes[last] = 0
	}
}

// InFlight implements sink.Sink.
func (s server) InFlight(_ context.Context, token string) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	blind := s.fault == seesNothing && s.name == "2"
	return s.running[token] > 0 && !blind, nil
}

// Present implements sink.Sink.
func (s server) Present(_ context.Context, keys *sink.Keys) ([]bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	type key struct {
		id        uuid.UUID
		eventType string
		at        int64
	}
	identity := func(k *sink.Keys, i int) key {
		if s.fault == comparesIDs {
			return key{id: k.EventID[i]}
		}
		return key{k.EventID[i], k.EventType.At(i), k.EventDateTime[i]}
	}
	stored := map[key]bool{}
	for i := range s.rows.Len() {
		stored[identity(&s.rows.Keys, i)] = true
	}
	present := make([]bool, keys.Len())
	for i := range present {
		missed := s.fault == findsNothing || s.fault == findsFirst && i >= 20_000
		present[i] = s.fault == findsAll || stored[identity(keys, i)] && !missed
	}
	return present, nil
}

// Partitions implements sink.Sink.
func (s server) Partitions(_ context.Context, keys *sink.Keys) ([]int, error) {
	numbers := make([]int, keys.Len())
	for i, at := range keys.EventDateTime {
		if s.fault != mergesPartitions {
			numbers[i] = time.UnixMicro(at).UTC().Year()*12 + int(time.UnixMicro(at).UTC().Month())
		}
	}
	return numbers, nil
}

// Undecided implements sink.Sink.
func (server) Undecided() bool { return false }

// Check implements sink.Sink.
func (s server) Check(context.Context) error {
	if s.fault == lacksWindow {
		return &sink.MisconfiguredError{Problem: "window off"}
	}
	return nil
}

// Destination implements sink.Sink.
func (s server) Destination(context.Context) (string, error) {
	if s.fault == hasManyTables {
		return "table of " + s.name, nil
	}
	return "table", nil
}

// Ping implements sink.Sink.
func (server) Ping(context.Context) error { return nil }

// Close implements sink.Sink.
func (server) Close() error { return nil }
