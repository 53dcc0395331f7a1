package store

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// Defaults of Options.
const (
	// DefaultMaxRows bounds the events of a batch.
	DefaultMaxRows = 50_000
	// DefaultMaxBytes bounds the bytes of a batch: 32 MiB.
	DefaultMaxBytes = 32 << 20
	// DefaultFlushTimeout bounds the duration of an insert.
	DefaultFlushTimeout = 30 * time.Second
	// DefaultMaxDeadLetters bounds the dead letters of the fleet in an hour.
	DefaultMaxDeadLetters = 1_000
	// DefaultMaxDelay bounds the delay of a batch that failed.
	DefaultMaxDelay = 30 * time.Second
)

// BatchesChannel is the channel on which a relay notifies other relays of new batches.
const BatchesChannel = "diehard_outbox_batches"

// Bounds that are not configurable.
const (
	// batchesPerCut bounds the batches of a cut, and thereby the time that the cut holds
	// the lock of the fleet.
	batchesPerCut = 4
	// maxUnattempted bounds the batches without an attempt, maxBatches the batches that
	// are not failing, and maxFailing the others. Batches must not pile up in an outage of
	// the sink, because every claim and cut reads them.
	maxUnattempted = 8
	maxBatches     = 256
	maxFailing     = 4096
	// maxParted is the number of failing batches above which a failing batch is not
	// parted into more than one batch.
	maxParted = maxFailing / 2
	// unverifiedMargin is added to the longest flush timeout while a relay waits for an
	// insert of a lost history.
	unverifiedMargin = 5 * time.Second
	// leaseMargin is added to the flush timeout to get the time after which the server
	// ends an idle lease. A suspended worker keeps its batch for this time.
	leaseMargin = 10 * time.Second
	// pagesAtOnce bounds the pages of outbox_events that a poll reads in their physical
	// order: 2 MiB.
	pagesAtOnce = 256
	// watermarkTrail is how long the low watermark waits before it passes an event that
	// was cut, because a lower id may commit later. Poll finds commits after this time.
	watermarkTrail = time.Second
)

// Options configure a Store.
type Options struct {
	// MaxRows bounds a batch's events. MaxBytes bounds the bytes of their contexts plus
	// 128 for each event. A larger event gets its own batch.
	MaxRows  int
	MaxBytes int64
	// FlushTimeout bounds one insert into the sink. The default is
	// DefaultFlushTimeout.
	FlushTimeout time.Duration
	// MaxDelay is the longest delay that Retry gets. The default is DefaultMaxDelay.
	MaxDelay time.Duration
	// MaxDeadLetters bounds the dead letters of the fleet in an hour. The bound is higher
	// if a hundredth of the events that were cut in the hour is more. The default is
	// DefaultMaxDeadLetters.
	MaxDeadLetters int
	// Schema is the schema of the outbox's tables. If Schema is empty, PostgreSQL finds
	// the tables by the session's search_path.
	Schema string
	// Lossless says that no failover of the server loses a commit. A failover is then no
	// change of history.
	Lossless bool
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
	if o.MaxDeadLetters <= 0 {
		o.MaxDeadLetters = DefaultMaxDeadLetters
	}
	if o.MaxDelay <= 0 {
		o.MaxDelay = DefaultMaxDelay
	}
}

// Store gives relays access to the outbox. It is safe for concurrent use by any number of
// workers in any number of processes.
type Store struct {
	db  *sqlx.DB
	o   Options
	sql func(string) string // adds the schema, and how the timelines are compared, to a statement

	lateCommits atomic.Int64 // polls that have found a late commit
	lastLate    atomic.Int64 // the id of the last late commit
	claims      atomic.Int64 // counts claims, which alternate between failed batches and other batches

	watermarkTrail time.Duration // the constant; specs change it
	destination    atomic.Pointer[string]

	mu          sync.Mutex
	history     knownHistory
	late        lateSearch
	fuseBlownAt sql.NullTime
	pause       *Pause
	limit       sizeLimit
	quarantine  map[string]struct{} // event types
	oldestBatch uuid.UUID           // the lower bound of all batch ids at the last Poll; the database checks this hint

	backlog backlog
}

// New returns a Store on db. The connections of db must have the settings of Session.
func New(db *sqlx.DB, o Options) *Store {
	o.setDefaults()
	sameTimeline, inSchema := sameTimelineSQL, postgres.InSchema(o.Schema)
	if o.Lossless {
		sameTimeline = "true"
	}
	complete := func(statement string) string {
		return inSchema(strings.ReplaceAll(statement, "{same_timeline}", sameTimeline))
	}
	return &Store{db: db, o: o, sql: complete, watermarkTrail: watermarkTrail}
}

func (s *Store) batchHint() uuid.UUID {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.oldestBatch
}

// forgetBatches makes the next statements read all batches.
func (s *Store) forgetBatches() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.oldestBatch = uuid.Nil
}

// get, selectAll and exec execute one statement that is its own transaction, with the
// settings of Session. They cannot execute VACUUM, which fails in a transaction.
func (s *Store) get(ctx context.Context, dest any, statement string, args ...any) error {
	return postgres.InSession(ctx, s.db, func(q postgres.Session) error {
		return sqlx.GetContext(ctx, q, dest, s.sql(statement), args...)
	})
}

func (s *Store) selectAll(ctx context.Context, dest any, statement string, args ...any) error {
	return postgres.InSession(ctx, s.db, func(q postgres.Session) error {
		return sqlx.SelectContext(ctx, q, dest, s.sql(statement), args...)
	})
}

func (s *Store) exec(ctx context.Context, statement string, args ...any) (result sql.Result, err error) {
	err = postgres.InSession(ctx, s.db, func(q postgres.Session) (err error) {
		result, err = q.ExecContext(ctx, s.sql(statement), args...)
		return err //nolint:wrapcheck // the caller wraps it
	})
	return result, err
}

func (s *Store) begin(ctx context.Context) (*sqlx.Tx, error) {
	tx, err := s.db.BeginTxx(ctx, &sql.TxOptions{Isolation: sql.LevelReadCommitted})
	if err != nil {
		return nil, fmt.Errorf("begin: %w", err)
	}
	return tx, nil
}
