package store

import (
	"context"
	"database/sql"
	"fmt"
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
