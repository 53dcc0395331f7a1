package store

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Stats are the outbox's figures.
type Stats struct {
	// BacklogEvents is exact if fewer than 10,000 events are not in a batch. Otherwise the
	// number is an estimate, which becomes better with each CountBacklog. A late commit
	// counts when a cut has put it into a batch, after the poll that finds it.
	BacklogEvents int64
	// OldestSeconds is the age of the oldest event, 0 if the outbox is empty.
	OldestSeconds float64
	// Batches has the batches by their state.
	Batches map[BatchState]BatchStats
	// FailingBatches is the number of Batches with a failure, also while a worker attempts
	// them.
	FailingBatches int64
	// DeadLetters is exact below 10,000. 10,000 means 10,000 or more. DeadLetterTypes has
	// the 20 most frequent event types of the newest 1,000.
	DeadLetters     int64
	DeadLetterTypes map[string]int64
	// BacklogBytes is an estimate, at most SizeBytes.
	BacklogBytes int64
	// Unverified says that waiting events are from before the last change of history.
	Unverified bool
	// SizeBytes is the size of outbox_events with its indexes, including dead rows.
	SizeBytes int64
}

// BatchStats are the figures of the batches in one state.
type BatchStats struct {
	Batches int64 `json:"batches"`
	Events  int64 `json:"events"`
	// OldestSeconds is the age of the first event of the oldest batch.
	OldestSeconds float64 `json:"oldest_seconds"`
}

// BatchCount returns the number of batches in all states.
func (s *Stats) BatchCount() (n int64) {
	for _, state := range s.Batches {
		n += state.Batches
	}
	return n
}

// jsonColumn is a column with JSON.
type jsonColumn[T any] struct{ value T }

// Scan implements sql.Scanner.
func (c *jsonColumn[T]) Scan(value any) error { return scanJSON(value, &c.value) }

var _ sql.Scanner = (*jsonColumn[int])(nil)

// exactBacklog is the number of events that are not in a batch below which Stats counts
// them.
const exactBacklog = 10_000

// Stats returns the outbox's figures. The cost does not grow with the outbox.
func (s *Store) Stats(ctx context.Context) (Stats, error) {
	var row struct {
		Batches         jsonColumn[map[BatchState]BatchStats] `db:"batches"`
		FailingBatches  int64                                 `db:"failing_batches"`
		BatchEvents     int64                                 `db:"batch_events"`
		UncutEvents     int64                                 `db:"uncut_events"`
		HighWatermark   int64                                 `db:"high_watermark"`
		HighestID       int64                                 `db:"highest_id"`
		OldestSeconds   float64                               `db:"oldest_seconds"`
		DeadLetters     int64                                 `db:"dead_letters"`
		DeadLetterTypes jsonColumn[map[string]int64]          `db:"dead_letter_types"`
		BacklogBytes    int64                                 `db:"backlog_bytes"`
		Unverified      bool                                  `db:"unverified"`
		SizeBytes       int64                                 `db:"size_bytes"`
	}
	if err := s.get(ctx, &row, statsSQL, s.known().cuts, exactBacklog); err != nil {
		return Stats{}, fmt.Errorf("read the outbox's figures: %w", err)
	}
	uncut := row.UncutEvents
	if uncut == exactBacklog {
		uncut = s.backlog.estimate(row.HighWatermark, row.HighestID)
	}
	return Stats{
		BacklogEvents: row.BatchEvents + uncut, OldestSeconds: row.OldestSeconds,
		Batches: row.Batches.value, FailingBatches: row.FailingBatches,
		DeadLetters: row.DeadLetters, DeadLetterTypes: row.DeadLetterTypes.value,
		BacklogBytes: row.BacklogBytes, Unverified: row.Unverified, SizeBytes: row.SizeBytes,
	}, nil
}

const (
	// backlogChunk is the number of events that are counted together. backlogAtOnce bounds
	// the events that one CountBacklog counts: it takes about a quarter of a second.
	backlogChunk  = 10_000
	backlogAtOnce = 500_000
	// backlogWanted is the time for which an estimate keeps CountBacklog working.
	backlogWanted = time.Minute
)

// backlog counts a large backlog apart from Stats. It keeps the number of events for
// neighboring ranges of ids, because ids have gaps: transactions were rolled back. As cuts
// take events, the ranges below the high watermark fall away.
type backlog struct {
	counting sync.Mutex // held during a count

	mu     sync.Mutex
	wanted time.Time // the last estimate
	lower  int64     // the chunks begin above this id
	chunks []backlogRange
	whole  bool // the last count has reached the end; the last chunk is then counted again
	stale  int  // the next chunk to count again, because transactions commit late
}

// backlogRange is the number of events that are not in a batch, above the range before and
// up to an id.
type backlogRange struct {
	Upper  int64 `db:"upper"`
	Events int64 `db:"events"`
}

// estimate returns the number of events above the high watermark and up to an id. Ids that
// were not counted yet have the density of the others. If only ids that were drawn since the
// last count are missing, they have no gaps.
func (b *backlog) estimate(highWatermark, highest int64) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wanted = time.Now()
	events, ids, lower := 0.0, 0.0, b.lower
	for _, chunk := range b.chunks {
		if from := max(lower, highWatermark); chunk.Upper > from {
			events += float64(chunk.Events) * float64(chunk.Upper-from) / float64(chunk.Upper-lower)
			ids += float64(chunk.Upper - from)
		}
		lower = chunk.Upper
	}
	density := 1.0
	if ids > 0 && !b.whole {
		density = events / ids
	}
	events += density * float64(max(0, highest-max(lower, highWatermark)))
	return max(exactBacklog, int64(events))
}

// CountBacklog counts a part of a large backlog, so that Stats can estimate the rest. If
// nobody has asked for an estimate in the last minute, it does nothing. It returns whether
// more events are to be counted.
func (s *Store) CountBacklog(ctx context.Context) (more bool, err error) {
	b := &s.backlog
	b.counting.Lock()
	defer b.counting.Unlock()
	b.mu.Lock()
	wanted := time.Since(b.wanted) < backlogWanted
	if !wanted {
		b.chunks, b.lower, b.stale, b.whole = nil, 0, 0, false
	}
	b.mu.Unlock()
	if !wanted {
		return false, nil
	}
	var highWatermark int64
	if err := s.get(ctx, &highWatermark, highWatermarkSQL, s.known().cuts); err != nil {
		return false, fmt.Errorf("read the high watermark: %w", err)
	}
	if err := s.recount(ctx, highWatermark); err != nil {
		return false, err
	}
	b.mu.Lock()
	from, kept := b.lower, len(b.chunks)
	if b.whole && kept > 0 {
		kept-- // the last chunk was still growing
	}
	if kept > 0 {
		from = b.chunks[kept-1].Upper
	}
	b.mu.Unlock()
	var counted []backlogRange
	if err := s.selectAll(ctx, &counted, countUncutSQL, from, backlogChunk, backlogAtOnce); err != nil {
		return false, fmt.Errorf("count the backlog: %w", err)
	}
	var events int64
	for _, chunk := range counted {
		events += chunk.Events
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.chunks = append(b.chunks[:kept], counted...)
	b.whole = events < backlogAtOnce
	return !b.whole, nil
}

// recount drops the ranges that were cut, and counts two ranges again: the one that is
// partly cut, and in turn one of the others.
func (s *Store) recount(ctx context.Context, highWatermark int64) error {
	b := &s.backlog
	b.mu.Lock()
	if highWatermark < b.lower { // a change of history has set the cursor back
		b.chunks, b.lower = nil, highWatermark
	}
	cut := 0
	for cut < len(b.chunks) && b.chunks[cut].Upper <= highWatermark {
		b.lower = b.chunks[cut].Upper
		cut++
	}
	b.chunks = slices.Delete(b.chunks, 0, cut)
	b.lower = max(b.lower, highWatermark)
	b.stale -= cut
	if b.stale < 1 || b.stale >= len(b.chunks) {
		b.stale = min(1, len(b.chunks))
	}
	again := []int{0, b.stale}
	b.stale++
	lower, chunks := b.lower, slices.Clone(b.chunks)
	b.mu.Unlock()
	for _, i := range again {
		if i >= len(chunks) {
			continue
		}
		from := lower
		if i > 0 {
			from = chunks[i-1].Upper
		}
		var events int64
		if err := s.get(ctx, &events, countBetweenSQL, from, chunks[i].Upper); err != nil {
			return fmt.Errorf("count the backlog again: %w", err)
		}
		b.mu.Lock()
		b.chunks[i].Events = events
		b.mu.Unlock()
	}
	return nil
}

const highWatermarkSQL = `SELECT coalesce((SELECT high_watermark FROM {schema}outbox_cursor WHERE cuts >= $1 ORDER BY cuts DESC LIMIT 1), 0)`
