package store

import (
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// Defaults of Options.
const (
	// DefaultMaxRows is a batch's bound in events.
	DefaultMaxRows = 50_000
	// DefaultMaxBytes is a batch's bound in bytes: 32 MiB.
	DefaultMaxBytes = 32 << 20
	// DefaultFlushTimeout is an insert's bound in time.
	DefaultFlushTimeout = 30 * time.Second
)

// BatchesChannel is the channel on which a relay tells the others that batches wait to
// be claimed.
const BatchesChannel = "diehard_outbox_batches"

// Bounds that nobody needs to turn.
const (
	// batchesPerCut bounds how long one cut holds the fleet's lock.
	batchesPerCut = 4
	// maxUnsent and maxBatches bound the manifests that wait: an outage of
	// the sink must not pile them up, and whatever looks for work reads them.
	maxUnsent  = 8
	maxBatches = 256
	// unverifiedMargin is how much longer than FlushTimeout an insert of a lost
	// history is waited for.
	unverifiedMargin = 5 * time.Second
	// leaseMargin is how much longer than a flush a lease may be idle before the
	// server ends it: a worker that is stopped keeps its batch for so long.
	leaseMargin = 10 * time.Second
	// watermarkTrail is how long the lowWatermark stays below what was cut, for events
	// that commit later than others with a higher id. What commits later still
	// is found by Poll.
	watermarkTrail = time.Second
)

// Options configure a Store.
type Options struct {
	// MaxRows bounds a batch's events, MaxBytes the bytes of their contexts
	// and 128 for each; an event that is larger goes alone.
	MaxRows  int
	MaxBytes int64
	// FlushTimeout is the longest that one insert into the sink may take;
	// DefaultFlushTimeout by default.
	FlushTimeout time.Duration
	// Schema is the schema of the outbox's tables. If it is empty, they are found by
	// the session's search_path.
	Schema string
}

func (o *Options) setDefaults() {
	if o.MaxRows <= 0 {
		o.MaxRows = DefaultMaxRows
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = DefaultMaxBytes
	}
	if o.FlushTimeout <= 0 {
		o.FlushTimeout = DefaultFlushTimeout
	}
}

// Session returns the settings that the store's connections must have. They
// keep its plans independent of statistics, and bound how long a worker that
// is gone without a word keeps what it holds: flushTimeout is the longest that
// a lease's transaction is idle on purpose.
func Session(flushTimeout time.Duration) map[string]string {
	milliseconds := func(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }
	return map[string]string{
		"jit":                                 "off",
		"enable_seqscan":                      "off",
		"enable_bitmapscan":                   "off",
		"enable_memoize":                      "off",
		"statement_timeout":                   milliseconds(5 * time.Minute),
		"lock_timeout":                        milliseconds(30 * time.Second),
		"idle_in_transaction_session_timeout": milliseconds(flushTimeout + leaseMargin),
		"tcp_keepalives_idle":                 "10",
		"tcp_keepalives_interval":             "5",
		"tcp_keepalives_count":                "3",
		"tcp_user_timeout":                    milliseconds(25 * time.Second),
	}
}

// Store is the relay's half of the outbox. It is safe for concurrent use by
// any number of workers in any number of processes.
type Store struct {
	db  *sqlx.DB
	o   Options
	sql func(string) string // puts the schema into a statement

	claims atomic.Int64 // whose turn it is

	watermarkTrail time.Duration // the constant; specs change it

	// Hints only, each checked by the database where something hangs on it.
	mu           sync.Mutex
	cuts         int64     // the cursor's key when it was last seen
	lowWatermark int64     // the cursor's lowWatermark then
	oldestBatch  uuid.UUID // no manifest was or will be older, as Poll saw it last
}

// New returns a Store on db, whose connections have the settings of
// Session.
func New(db *sqlx.DB, o Options) *Store {
	o.setDefaults()
	return &Store{db: db, o: o, sql: postgres.InSchema(o.Schema), watermarkTrail: watermarkTrail}
}

// ErrHistoryChanged is what Cut returns once when it finds that the server's
// identity or timeline is not the one that the batches were written under:
// after a failover or a restore. It has arranged for everything that was there
// to be asked for at the sink before it is sent.
var ErrHistoryChanged = errors.New("postgresql's history has changed (a failover or a restore): " +
	"what waits is looked up at the sink before it is sent")

// Stats are the outbox's figures.
type Stats struct {
	// BacklogEvents is exact up to 10,000 events that are in no batch yet, and
	// may be too high beyond.
	BacklogEvents int64 `db:"backlog_events"`
	// OldestSeconds is the age of the oldest event that waits, 0 if none does.
	OldestSeconds float64 `db:"oldest_seconds"`
	Batches       int64   `db:"batches"`
	// DeadLetters is exact below 10,000, and 10,000 from there on.
	DeadLetters int64 `db:"dead_letters"`
}

// Stats returns the outbox's figures at a cost that does not grow with it.
func (s *Store) Stats(ctx context.Context) (Stats, error) {
	var stats Stats
	if err := s.db.GetContext(ctx, &stats, s.sql(statsSQL), s.cutsHint()); err != nil {
		return Stats{}, fmt.Errorf("read the outbox's figures: %w", err)
	}
	return stats, nil
}

// Poll tells whether there may be work to cut or to claim. It is the poll: one
// statement, outside of any lock. It also finds what the hints hide: an event
// that committed long after others with higher ids gets the lowWatermark lowered, so
// that the next Cut takes it.
func (s *Store) Poll(ctx context.Context) (work bool, err error) {
	s.mu.Lock()
	lowWatermark, cuts := s.lowWatermark, s.cuts
	s.mu.Unlock()
	var seen struct {
		LateCommit  int64         `db:"late_commit"`
		AboveFloor  bool          `db:"above_floor"`
		OldestBatch uuid.NullUUID `db:"oldest_batch"`
		LastCutAt   sql.NullTime  `db:"last_cut_at"`
	}
	if err := s.db.GetContext(ctx, &seen, s.sql(pollSQL), lowWatermark, cuts); err != nil {
		return false, fmt.Errorf("look for work: %w", err)
	}
	oldest := seen.OldestBatch.UUID
	if !seen.OldestBatch.Valid && seen.LastCutAt.Valid {
		// Whatever is cut from now on is younger, also where a cut is under way.
		oldest = firstBatchID(seen.LastCutAt.Time)
	}
	s.mu.Lock()
	s.oldestBatch = oldest
	s.mu.Unlock()
	if seen.LateCommit > 0 {
		if err := s.lowerWatermark(ctx, seen.LateCommit-1); err != nil {
			return false, err
		}
	}
	return seen.AboveFloor || seen.OldestBatch.Valid || seen.LateCommit > 0, nil
}

func (s *Store) cutsHint() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cuts
}

// forgetCursor makes the next statements look for the cursor from the start.
func (s *Store) forgetCursor() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cuts = 0
}

func (s *Store) batchHint() uuid.UUID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.oldestBatch
}

// forgetBatches makes the next statements look at every manifest.
func (s *Store) forgetBatches() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.oldestBatch = uuid.Nil
}

func (s *Store) begin(ctx context.Context) (*sqlx.Tx, error) {
	tx, err := s.db.BeginTxx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return nil, fmt.Errorf("begin: %w", err)
	}
	return tx, nil
}

// newBatchID returns a UUID v7 of the database's time t, to the microsecond.
// Cuts pass times that only rise, so batches are ordered by their ids.
func newBatchID(t time.Time) uuid.UUID {
	id := firstBatchID(t)
	binary.BigEndian.PutUint64(id[8:], rand.Uint64()>>2|1<<63) //nolint:gosec // an id, not a secret
	return id
}

// firstBatchID returns the lowest of the ids that newBatchID makes of t.
func firstBatchID(t time.Time) uuid.UUID {
	var id uuid.UUID
	micros := t.UnixMicro()
	fraction := micros % 1000 * 4096 / 1000
	binary.BigEndian.PutUint64(id[:8], uint64(micros/1000)<<16|0x7000|uint64(fraction))
	return id
}

// batchTime returns the time that newBatchID made the id of.
func batchTime(id uuid.UUID) time.Time {
	head := binary.BigEndian.Uint64(id[:8])
	millis, fraction := int64(head>>16), int64(head&0xfff)
	return time.UnixMicro(millis*1000 + (fraction*1000+4095)/4096)
}

// multirange returns the ids, which ascend, as PostgreSQL writes an
// int8multirange.
func multirange(ids []int64) string {
	text := []byte{'{'}
	for i := 0; i < len(ids); {
		last := i
		for last+1 < len(ids) && ids[last+1] == ids[last]+1 {
			last++
		}
		if i > 0 {
			text = append(text, ',')
		}
		text = append(text, '[')
		text = strconv.AppendInt(text, ids[i], 10)
		text = append(text, ',')
		text = strconv.AppendInt(text, ids[last]+1, 10)
		text = append(text, ')')
		i = last + 1
	}
	return string(append(text, '}'))
}
