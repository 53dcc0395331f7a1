package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/google/uuid"
	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// look is the result of lookSQL.
type look struct {
	Cuts          sql.NullInt64  `db:"cuts"`
	LowWatermark  sql.NullInt64  `db:"low_watermark"`
	HighWatermark sql.NullInt64  `db:"high_watermark"`
	LastBatchAt   sql.NullTime   `db:"last_batch_at"`
	SameHistory   bool           `db:"same_history"`
	Ascending     bool           `db:"ascending"`
	FuseBlownAt   sql.NullTime   `db:"fuse_blown_at"`
	PausedAt      sql.NullTime   `db:"paused_at"`
	PausedBy      sql.NullString `db:"paused_by"`
	Quarantine    pq.StringArray `db:"quarantine"`
	Publishers    pq.StringArray `db:"publishers"`
}

// seen is the result of pollSQL.
type seen struct {
	LateCommit  sql.NullInt64 `db:"late_commit"`
	Above       bool          `db:"above"`
	OldestBatch uuid.NullUUID `db:"oldest_batch"`
	Overlong    bool          `db:"overlong"`
	Pages       int64         `db:"pages"`
}

// Poll returns whether events may wait for a cut, or batches for a claim, unless the fleet
// is paused. It takes no lock. If it finds a late commit below the low watermark, it lowers the low watermark, so
// that the next Cut takes the event. It also ends waits that are longer than any wait can
// be, because the clock was set back.
//
// Late commits of INSERT statements are found by the next Poll. To find events that have
// come otherwise, each Poll reads some pages of the table. See
// docs/adr/0033-the-search-for-late-commits.md.
func (s *Store) Poll(ctx context.Context) (work bool, err error) {
	s.mu.Lock()
	before, late := s.history, s.late
	s.mu.Unlock()
	var poll struct {
		look
		seen
	}
	longest := max(s.o.MaxDelay.Seconds(), s.unverifiedSeconds())
	parameters := func(l lateSearch, highest int64) []any {
		return []any{l.from, highest, tid(l.page), tid(l.page + pagesAtOnce), longest, s.longestQuarantine()}
	}
	expected, isIdle := late.idle()
	if isIdle {
		err = s.get(ctx, &poll, idlePollSQL,
			append([]any{before.incarnation, before.cuts}, parameters(expected, expected.ceiling)...)...)
	} else {
		err = s.get(ctx, &poll.look, lookSQL, before.incarnation, before.cuts)
	}
	if err != nil {
		return false, fmt.Errorf("poll for work: %w", err)
	}
	look := poll.look
	s.setFuse(look.FuseBlownAt)
	s.setPause(look.PausedAt, look.PausedBy.String)
	s.setQuarantine(look.Quarantine)
	if !look.Cuts.Valid || !look.SameHistory {
		return true, nil // the next cut finds out why
	}
	highest := max(look.HighWatermark.Int64, look.LowWatermark.Int64)
	search := late.next(highest, look.Ascending, look.Publishers)
	if !isIdle || search.from != expected.from || highest != expected.ceiling {
		if err := s.get(ctx, &poll.seen, pollSQL, parameters(search, highest)...); err != nil {
			return false, fmt.Errorf("poll for work: %w", err)
		}
	}
	seen := poll.seen
	if seen.Overlong {
		if _, err := s.exec(ctx, limitWaitsSQL, longest, s.longestQuarantine()); err != nil {
			return false, fmt.Errorf("limit the waits of batches: %w", err)
		}
	}
	oldest := seen.OldestBatch.UUID
	if !seen.OldestBatch.Valid {
		// All later batches are younger, including the batches of a cut that is not
		// committed yet.
		oldest = firstBatchID(look.LastBatchAt.Time)
	}
	s.mu.Lock()
	if s.history.incarnation == before.incarnation { // otherwise the values are of an earlier history
		s.history.cuts = max(s.history.cuts, look.Cuts.Int64)
		s.oldestBatch = oldest
		s.late = search.done(seen.LateCommit, seen.Pages)
	}
	s.mu.Unlock()
	if seen.LateCommit.Valid && s.lastLate.Swap(seen.LateCommit.Int64) != seen.LateCommit.Int64 {
		s.lateCommits.Add(1)
	}
	if seen.LateCommit.Valid && seen.LateCommit.Int64 <= look.LowWatermark.Int64 {
		if err := s.lowerWatermark(ctx, seen.LateCommit.Int64-1); err != nil {
			return false, err
		}
	}
	return !look.PausedAt.Valid && (seen.Above || seen.OldestBatch.Valid || seen.LateCommit.Valid), nil
}

// LateCommits returns the number of polls that have found a late commit.
func (s *Store) LateCommits() int64 { return s.lateCommits.Load() }

func tid(page int64) string { return fmt.Sprintf("(%d,0)", page) }

// lateSearch remembers where events can still appear that no cut finds: below the ids
// that were cut. The zero value remembers nothing, so the next search reads all ids.
type lateSearch struct {
	// ceiling is the highest id that was cut before the last Poll. Every id that was
	// drawn after this Poll is higher.
	ceiling int64
	// publishers are the transactions that were open at the last Poll. Each has drawn only
	// ids above its value.
	publishers map[string]int64
	// from is where the next search starts because the last search has found an event
	// there. Otherwise it is math.MaxInt64.
	from int64
	page int64 // the next page of the table to read
}

// idle returns the search of the next Poll if the high watermark does not move until then.
// It returns false if the search depends on the transactions that the Poll finds open. See
// docs/adr/0033-the-search-for-late-commits.md.
func (l lateSearch) idle() (lateSearch, bool) {
	if l.publishers == nil || len(l.publishers) > 0 || l.from != math.MaxInt64 {
		return lateSearch{}, false
	}
	return l.next(l.ceiling, true, nil), true
}

// next returns the search of the next Poll. Its from is the id above which this Poll
// searches. Each event that has appeared since the last Poll belongs to a transaction
// that was open then and has ended, or that has begun after it.
func (l lateSearch) next(highest int64, ascending bool, publishers []string) lateSearch {
	if !ascending {
		return lateSearch{page: l.page}
	}
	next := lateSearch{ceiling: highest, publishers: make(map[string]int64, len(publishers)), page: l.page}
	for _, publisher := range publishers {
		next.publishers[publisher] = 0
	}
	if l.publishers != nil {
		next.from = min(l.ceiling, l.from)
		for publisher, above := range l.publishers {
			if _, open := next.publishers[publisher]; !open {
				next.from = min(next.from, above)
			}
		}
	}
	for publisher := range next.publishers {
		above, open := l.publishers[publisher]
		switch {
		case open:
		case strings.HasPrefix(publisher, preparedPrefix):
			above = next.from // it had another name before it was prepared
		default:
			above = l.ceiling
		}
		next.publishers[publisher] = above
	}
	return next
}

// preparedPrefix begins the virtual transaction ids of prepared transactions.
const preparedPrefix = "-1/"

// done returns what to remember after the search: the event that it found, if any, and
// the number of the table's pages.
func (l lateSearch) done(found sql.NullInt64, pages int64) lateSearch {
	l.from = math.MaxInt64
	if found.Valid {
		l.from = found.Int64 - 1
	}
	l.page += pagesAtOnce
	if l.page >= pages {
		l.page = 0
	}
	return l
}

// lowerWatermark makes the next cut start above lowWatermark. If another process is
// cutting, it does nothing, and the next Poll tries again.
func (s *Store) lowerWatermark(ctx context.Context, lowWatermark int64) error {
	tx, err := s.begin(ctx)
	if err != nil {
		return fmt.Errorf("lower the low watermark: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit
	cursor, err := s.lockCursor(ctx, tx)
	if _, changed := errors.AsType[*mismatchError](err); changed || cursor == nil {
		return nil // the next cut finds out why
	}
	if err != nil {
		return fmt.Errorf("lower the low watermark: %w", err)
	}
	if _, err := tx.ExecContext(ctx, s.sql(lowerWatermarkSQL), cursor.Cuts, lowWatermark); err != nil {
		return fmt.Errorf("lower the low watermark: %w", err)
	}
	failpoint.At(failpoint.WatermarkBeforeCommit)
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("lower the low watermark: %w", err)
	}
	return nil
}
