package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
)

// ErrHistoryChanged says that the outbox may lack cuts and attempts that have happened:
// PostgreSQL failed over, was restored, or is another server. Cut returns it once for each
// change, with the signs of the change. All waiting events are then unverified, so the
// relay resolves them before it inserts them.
var ErrHistoryChanged = errors.New("postgresql's history has changed (a failover, a restore or a switchover)")

// SubscribedError says that subscriptions of logical replication write into the outbox.
// The events belong to the publishing server until the subscriptions end.
type SubscribedError struct {
	Subscriptions []string
}

// Error says what to do.
func (e *SubscribedError) Error() string {
	return fmt.Sprintf("logical replication writes into the outbox (subscription %s): "+
		"to deliver from this server, stop the publishers and relays of the other server, wait until replication has caught up, "+
		"and run DROP SUBSCRIPTION", strings.Join(e.Subscriptions, ", "))
}

// knownHistory is what the Store remembers of the outbox's history.
type knownHistory struct {
	incarnation uuid.NullUUID // null before the first cut
	cuts        int64         // the history has this many cuts, or more
}

func (s *Store) known() knownHistory {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.history
}

// learn remembers values that a cut has read or committed.
func (s *Store) learn(incarnation uuid.NullUUID, cuts int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.history.incarnation == incarnation {
		cuts = max(cuts, s.history.cuts)
	}
	s.history = knownHistory{incarnation, cuts}
}

// startOver remembers the history and forgets all hints, which are about another history.
func (s *Store) startOver(incarnation uuid.UUID, cuts int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.history = knownHistory{uuid.NullUUID{UUID: incarnation, Valid: true}, cuts}
	s.late, s.oldestBatch = lateSearch{}, uuid.Nil
}

// reconcile finds out why the outbox differs from what the Store knows of it. It records
// a change of history and returns ErrHistoryChanged. It returns a *SubscribedError while
// the outbox is a copy of another. It returns nil if the tables are in order again: another
// relay has recorded the change, or only the cursor was missing. cause is the sign that
// the caller has seen, or "".
func (s *Store) reconcile(ctx context.Context, cause string) error {
	tx, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit
	if _, err := tx.ExecContext(ctx, s.sql(lockHistorySQL)); err != nil {
		return fmt.Errorf("lock outbox_history: %w", err)
	}
	var subscriptions []string
	if err := tx.SelectContext(ctx, &subscriptions, s.sql(subscriptionsSQL)); err != nil {
		return fmt.Errorf("find subscriptions: %w", err)
	}
	if len(subscriptions) > 0 {
		if _, err := tx.ExecContext(ctx, s.sql(markSubscribedSQL)); err != nil {
			return fmt.Errorf("mark the outbox as subscribed: %w", err)
		}
		if err := tx.Commit(); err != nil {
			return fmt.Errorf("mark the outbox as subscribed: %w", err)
		}
		return &SubscribedError{subscriptions}
	}
	if _, err := tx.ExecContext(ctx, s.sql(awaitCursorSQL)); err != nil {
		return fmt.Errorf("wait for a cut: %w", err)
	}
	before := s.known()
	var now historyState
	if err := tx.GetContext(ctx, &now, s.sql(historySQL), before.incarnation); err != nil {
		return fmt.Errorf("read the history: %w", err)
	}
	signs := now.signs(before)
	if now.Cursors == 1 && now.Cuts == 0 && len(signs) == 0 {
		var foreign bool
		if err := tx.GetContext(ctx, &foreign, s.sql(isForeignSQL)); err != nil {
			return fmt.Errorf("read the first events: %w", err)
		}
		if foreign {
			signs = append(signs, "another outbox has filled the tables")
		}
	}
	if cause != "" {
		signs = append(signs, cause)
	}
	if len(signs) > 0 {
		return s.record(ctx, tx, before, signs)
	}
	if now.Cursors == 0 {
		if err := tx.GetContext(ctx, &now.Cuts, s.sql(resetCursorSQL)); err != nil {
			return fmt.Errorf("write the missing row of outbox_cursor: %w", err)
		}
	}
	if err := s.raiseFlushTimeout(ctx, tx); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("take over the history: commit: %w", err)
	}
	s.startOver(now.Incarnation, now.Cuts)
	return nil
}

// historyState compares the outbox with the server and with the Store's knowledge.
type historyState struct {
	Exists           bool      `db:"exists"`
	Original         bool      `db:"original"`
	SameServer       bool      `db:"same_server"`
	SameTimeline     bool      `db:"same_timeline"`
	TimelineUnknown  bool      `db:"timeline_unknown"`
	SameDatabase     bool      `db:"same_database"`
	SameIncarnation  bool      `db:"same_incarnation"`
	LaterIncarnation bool      `db:"later_incarnation"`
	Incarnation      uuid.UUID `db:"incarnation"`
	Cursors          int       `db:"cursors"`
	Cuts             int64     `db:"cuts"`
}

// signs returns the signs of a change of history that was not recorded.
func (h *historyState) signs(before knownHistory) (signs []string) {
	for _, s := range []struct {
		seen bool
		text string
	}{
		{!h.Exists, "outbox_history is empty"},
		{h.Exists && !h.SameServer, "another system identifier"},
		{h.Exists && !h.SameTimeline && !h.TimelineUnknown, "another timeline"},
		{h.Exists && !h.SameTimeline && h.TimelineUnknown, "another start of a server that does not show its timeline (see postgres.history)"},
		{h.Exists && !h.SameDatabase, "another database"},
		{h.Exists && !h.Original, "the row of outbox_history was copied or changed"},
		{h.Exists && !h.SameIncarnation && !h.LaterIncarnation, "an outbox that this relay does not know"},
		{h.Exists && h.SameIncarnation && h.Cursors > 0 && h.Cuts < before.cuts, "cuts of this relay are missing"},
		{h.Cursors > 1, "outbox_cursor had several rows"},
	} {
		if s.seen {
			signs = append(signs, s.text)
		}
	}
	return signs
}

// record records a change of history, commits, and returns ErrHistoryChanged.
func (s *Store) record(ctx context.Context, tx *sqlx.Tx, before knownHistory, signs []string) error {
	if _, err := tx.ExecContext(ctx, s.sql(unverifiedBatchesSQL), s.unverifiedSeconds()); err != nil {
		return fmt.Errorf("record the change of history: %w", err)
	}
	var now struct {
		Incarnation  uuid.UUID `db:"incarnation"`
		UnverifiedTo int64     `db:"unverified_to"`
	}
	if err := tx.GetContext(ctx, &now, s.sql(recordHistorySQL), before.incarnation, s.o.FlushTimeout.Seconds()); err != nil {
		return fmt.Errorf("record the change of history: %w", err)
	}
	var cuts int64
	if err := tx.GetContext(ctx, &cuts, s.sql(resetCursorSQL)); err != nil {
		return fmt.Errorf("reset the cursor: %w", err)
	}
	advice, err := s.raiseSequences(ctx, tx, now.UnverifiedTo)
	if err != nil {
		return err
	}
	failpoint.At(failpoint.HistoryBeforeCommit)
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("record the change of history: commit: %w", err)
	}
	failpoint.At(failpoint.HistoryCommitted)
	s.startOver(now.Incarnation, cuts)
	return fmt.Errorf("%w: %s%s", ErrHistoryChanged, strings.Join(signs, ", "), advice)
}

// raiseSequences raises the sequences of the ids that are behind the rows. Replication
// and some dumps do not copy sequences. Publishers would then get the ids of other events,
// and dead letters the ids of others. If the role may not raise a sequence, it returns
// advice for the operator. highest is the highest id of an event.
func (s *Store) raiseSequences(ctx context.Context, tx *sqlx.Tx, highest int64) (advice string, err error) {
	var behind []struct {
		Name     string `db:"name"`
		Highest  int64  `db:"highest"`
		MayRaise bool   `db:"may_raise"`
	}
	if err := tx.SelectContext(ctx, &behind, s.sql(sequencesBehindSQL), highest); err != nil {
		return "", fmt.Errorf("read the sequences of the ids: %w", err)
	}
	var statements []string
	for _, sequence := range behind {
		if !sequence.MayRaise {
			statements = append(statements, fmt.Sprintf("SELECT setval('%s', %d)", sequence.Name, sequence.Highest))
			continue
		}
		if _, err := tx.ExecContext(ctx, raiseSequenceSQL, sequence.Name, sequence.Highest); err != nil {
			return "", fmt.Errorf("raise the sequence %s: %w", sequence.Name, err)
		}
	}
	if len(statements) == 0 {
		return "", nil
	}
	return "; inserts will fail, because sequences are behind the rows: as the owner of the outbox, run " + strings.Join(statements, "; "), nil
}

// raiseFlushTimeout records the store's flush timeout in outbox_history, if no relay has
// used a longer one. So other relays wait long enough for the inserts of this relay, even
// if a failover has lost their tokens.
func (s *Store) raiseFlushTimeout(ctx context.Context, tx *sqlx.Tx) error {
	var longer bool
	if err := tx.GetContext(ctx, &longer, s.sql(isLongerFlushTimeoutSQL), s.o.FlushTimeout.Seconds()); err != nil {
		return fmt.Errorf("read the flush timeouts of the fleet: %w", err)
	}
	if !longer { // the server may be read-only
		return nil
	}
	if _, err := tx.ExecContext(ctx, s.sql(raiseFlushTimeoutSQL), s.o.FlushTimeout.Seconds()); err != nil {
		return fmt.Errorf("record the flush timeout: %w", err)
	}
	return nil
}

// completeIdentity records the identifier of the server if it is unknown, because the role
// that migrates could not read it.
func (s *Store) completeIdentity(ctx context.Context, tx *sqlx.Tx) error {
	var unknown bool
	if err := tx.GetContext(ctx, &unknown, s.sql(isIdentityUnknownSQL)); err != nil {
		return fmt.Errorf("read the identifier of the server: %w", err)
	}
	if !unknown { // the server may be read-only
		return nil
	}
	if _, err := tx.ExecContext(ctx, s.sql(completeIdentitySQL)); err != nil {
		return fmt.Errorf("record the identifier of the server: %w", err)
	}
	return nil
}

// unverifiedSeconds is the time during which an insert of this store in a lost history may
// still be in flight. The statements use it only if it is longer than insertsEndSQL.
func (s *Store) unverifiedSeconds() float64 { return (s.o.FlushTimeout + unverifiedMargin).Seconds() }
