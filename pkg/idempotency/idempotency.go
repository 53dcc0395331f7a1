// Package idempotency lets a client safely repeat a request whose response was lost. It
// stores the response under the client's key in the same transaction as the change.
// After a crash, the database has both the change and the response, or neither.
package idempotency

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// DefaultTTL is the default of Options.TTL.
const DefaultTTL = 24 * time.Hour

// MaxKeyBytes is the maximum length of a key.
const MaxKeyBytes = 255

var (
	// ErrInProgress means that another request with the same key is in progress.
	ErrInProgress = errors.New("another request with this idempotency key is in progress")
	// ErrClaimed means that the key was claimed before for the same request.
	ErrClaimed = errors.New("idempotency key already claimed")
	// ErrMismatch means that the key was used for a different request.
	ErrMismatch = errors.New("idempotency key already used for a different request")
)

// Options configures a Keeper. DB is required.
type Options struct {
	DB  *sqlx.DB
	Log *slog.Logger
	// TTL is how long a response is kept. The default is DefaultTTL.
	TTL time.Duration
	// Schema is the schema of the table idempotency_keys. If it is empty, the
	// session's search_path applies.
	Schema string
}

// Keeper stores responses under keys. It is safe for concurrent use. Keepers in several
// processes can share one database.
type Keeper struct {
	db  *sqlx.DB
	log *slog.Logger
	ttl time.Duration
	sql func(string) string // adds the schema to a statement
}

// NewKeeper returns a Keeper.
func NewKeeper(o Options) *Keeper {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.TTL <= 0 {
		o.TTL = DefaultTTL
	}
	return &Keeper{db: o.DB, log: o.Log, ttl: o.TTL, sql: postgres.InSchema(o.Schema)}
}

// Key is a client's key with the fingerprint of the request.
type Key struct {
	// Client is the name of the client. Each client has its own keys. The name must not
	// contain spaces. It may be empty.
	Client string
	// Value has 1 to MaxKeyBytes bytes.
	Value string
	// Fingerprint is a hash of the request.
	Fingerprint [32]byte
}

// Response is the HTTP response to a request.
type Response struct {
	Status   int    `db:"status"`
	Location string `db:"location"` // can be empty
	ETag     string `db:"etag"`     // can be empty
	Body     []byte `db:"body"`
	// Replayed is true if the response repeats an earlier one. It is not stored.
	Replayed bool `db:"-"`
}

// Do runs work once for a key and stores its response in tx. Later calls return the
// stored response, and replayed is true. If work fails, Do stores nothing. It returns
// ErrInProgress while another transaction holds the key, and ErrMismatch if the key was
// stored with a different fingerprint.
func (k *Keeper) Do(ctx context.Context, tx *sqlx.Tx, key Key, work func() (Response, error)) (response Response, replayed bool, err error) {
	response, replayed, err = k.take(ctx, tx, key)
	if err != nil || replayed {
		return response, replayed, err
	}
	failpoint.At(failpoint.KeyTaken)
	if response, err = work(); err != nil {
		return Response{}, false, err
	}
	result, err := tx.ExecContext(ctx, k.sql(keepSQL), key.Client, key.Value, key.Fingerprint[:], response.Status, response.Location,
		response.ETag, response.Body, k.ttl.Seconds())
	if err != nil {
		return Response{}, false, fmt.Errorf("store the response: %w", err)
	}
	rows, err := result.RowsAffected()
	if err != nil {
		return Response{}, false, fmt.Errorf("store the response: %w", err)
	}
	if rows != 1 { // a writer without the lock has stored a response
		return Response{}, false, ErrInProgress
	}
	failpoint.At(failpoint.KeyKept)
	return response, false, nil
}

// The lock belongs to the transaction, so a crash releases it.
const (
	lockSQL   = `SELECT ` + lockBegin + `$1::text || ' ' || $2::text` + lockEnd
	lockOfRow = lockBegin + `client || ' ' || key` + lockEnd
	lockBegin = `pg_try_advisory_xact_lock(hashtextextended('diehard idempotency key ' || `
	lockEnd   = `, 0))`
)

// Must run as a separate statement after the lock. The snapshot of this statement then
// includes the commit of the previous holder of the lock.
const selectSQL = `
SELECT fingerprint, status, location, etag, body
FROM {schema}idempotency_keys
WHERE client = $1 AND key = $2 AND expires_at > clock_timestamp()`

const keepSQL = `
INSERT INTO {schema}idempotency_keys (client, key, fingerprint, status, location, etag, body, expires_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, clock_timestamp() + $8 * interval '1 second')
ON CONFLICT (client, key) DO UPDATE
SET fingerprint = excluded.fingerprint, status = excluded.status, location = excluded.location,
    etag = excluded.etag, body = excluded.body, expires_at = excluded.expires_at
WHERE {schema}idempotency_keys.expires_at <= clock_timestamp()`

// take locks the key until tx ends and returns the stored response, if any.
func (k *Keeper) take(ctx context.Context, tx *sqlx.Tx, key Key) (response Response, found bool, err error) {
	var locked bool
	if err := tx.GetContext(ctx, &locked, lockSQL, key.Client, key.Value); err != nil {
		return Response{}, false, fmt.Errorf("lock the idempotency key: %w", err)
	}
	if !locked {
		return Response{}, false, ErrInProgress
	}
	return k.find(ctx, tx, key)
}

// RowResponse is the response to a request that inserts a row.
type RowResponse struct {
	// RowID is the row's id.
	RowID    uuid.UUID
	Key      Key
	Response Response
}

// ForRows returns SQL for a statement that inserts rows. It stores the response for each
// inserted row as Do does. The parameters of the SQL are numbered from first. All keys
// must be different.
//
// The condition is false for a row whose key is locked by another transaction. Otherwise,
// it locks the key. The statement fails if a key has a response, even if that response has
// expired.
func (k *Keeper) ForRows(responses []RowResponse, first int) postgres.Companion {
	n := len(responses)
	ids, clients, keys, fingerprints := make(pq.StringArray, n), make(pq.StringArray, n), make(pq.StringArray, n), make(pq.ByteaArray, n)
	statuses, locations, etags, bodies := make(pq.Int64Array, n), make(pq.StringArray, n), make(pq.StringArray, n), make(pq.ByteaArray, n)
	for i, r := range responses {
		ids[i], clients[i], keys[i], fingerprints[i] = r.RowID.String(), r.Key.Client, r.Key.Value, r.Key.Fingerprint[:]
		statuses[i], locations[i], etags[i], bodies[i] = int64(r.Response.Status), r.Response.Location, r.Response.ETag, r.Response.Body
	}
	return postgres.Companion{
		Condition: fmt.Sprintf(rowConditionSQL, first, first+1, first+2),
		Insert:    k.sql(fmt.Sprintf(keepRowsSQL, first+8, first, first+1, first+2, first+3, first+4, first+5, first+6, first+7)),
		Args:      []any{ids, clients, keys, fingerprints, statuses, locations, etags, bodies, k.ttl.Seconds()},
	}
}

// The statement tries each lock once, before it inserts the first row.
const rowConditionSQL = `id <> ALL (ARRAY(
    SELECT row_id FROM unnest($%d::uuid[], $%d::text[], $%d::text[]) AS keyed (row_id, client, key)
    WHERE NOT ` + lockOfRow + `))`

// Has no ON CONFLICT: a response that exists was committed by an earlier holder of the lock,
// and the whole statement must fail.
const keepRowsSQL = `
INSERT INTO {schema}idempotency_keys (client, key, fingerprint, status, location, etag, body, expires_at)
SELECT client, key, fingerprint, status, location, etag, body, clock_timestamp() + $%d * interval '1 second'
FROM unnest($%d::uuid[], $%d::text[], $%d::text[], $%d::bytea[], $%d::int[], $%d::text[], $%d::text[], $%d::bytea[])
     AS kept (row_id, client, key, fingerprint, status, location, etag, body)
WHERE row_id IN (SELECT id FROM inserted)`

// Claim claims different keys of one client in tx, without responses. It returns an error
// for each key: nil, ErrClaimed or ErrMismatch. It waits for a transaction that is claiming
// one of the keys.
func (k *Keeper) Claim(ctx context.Context, tx *sqlx.Tx, client string, keys []Key) ([]error, error) {
	values, fingerprints := make(pq.StringArray, len(keys)), make(pq.ByteaArray, len(keys))
	for i, key := range keys {
		values[i], fingerprints[i] = key.Value, key.Fingerprint[:]
	}
	var claimed []string
	if err := tx.SelectContext(ctx, &claimed, k.sql(claimSQL), client, values, fingerprints, k.ttl.Seconds()); err != nil {
		return nil, fmt.Errorf("claim idempotency keys: %w", err)
	}
	outcomes := make([]error, len(keys))
	if len(claimed) == len(keys) {
		return outcomes, nil
	}
	var kept []struct {
		Key         string `db:"key"`
		Fingerprint []byte `db:"fingerprint"`
	}
	if err := tx.SelectContext(ctx, &kept, k.sql(claimedSQL), client, values); err != nil {
		return nil, fmt.Errorf("read idempotency keys: %w", err)
	}
	for i, key := range keys {
		if slices.Contains(claimed, key.Value) {
			continue
		}
		outcomes[i] = ErrInProgress // the other row was deleted in the meantime
		for _, row := range kept {
			switch {
			case row.Key != key.Value:
			case bytes.Equal(row.Fingerprint, key.Fingerprint[:]):
				outcomes[i] = ErrClaimed
			default:
				outcomes[i] = ErrMismatch
			}
		}
		if outcomes[i] == ErrInProgress { //nolint:errorlint // assigned above
			return nil, ErrInProgress
		}
	}
	return outcomes, nil
}

// claimSQL takes the keys in order, so that two transactions cannot deadlock.
const claimSQL = `
INSERT INTO {schema}idempotency_keys AS kept (client, key, fingerprint, status, location, etag, body, expires_at)
SELECT $1, key, fingerprint, 0, '', '', '', clock_timestamp() + $4 * interval '1 second'
FROM unnest($2::text[], $3::bytea[]) AS given (key, fingerprint)
ORDER BY key
ON CONFLICT (client, key) DO UPDATE
SET fingerprint = excluded.fingerprint, expires_at = excluded.expires_at
WHERE kept.expires_at <= clock_timestamp()
RETURNING key`

const claimedSQL = `
SELECT key, fingerprint FROM {schema}idempotency_keys WHERE client = $1 AND key = ANY($2::text[])`

// Find returns the response that is stored for the key, if any. It returns ErrMismatch as Do
// does.
func (k *Keeper) Find(ctx context.Context, key Key) (response Response, found bool, err error) {
	return k.find(ctx, k.db, key)
}

func (k *Keeper) find(ctx context.Context, q sqlx.QueryerContext, key Key) (response Response, found bool, err error) {
	var kept struct {
		Fingerprint []byte `db:"fingerprint"`
		Response
	}
	err = sqlx.GetContext(ctx, q, &kept, k.sql(selectSQL), key.Client, key.Value)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return Response{}, false, nil
	case err != nil:
		return Response{}, false, fmt.Errorf("read the idempotency key: %w", err)
	case !bytes.Equal(kept.Fingerprint, key.Fingerprint[:]):
		return Response{}, false, ErrMismatch
	}
	return kept.Response, true, nil
}

const (
	// cleanInterval is the interval between deletions of expired responses.
	cleanInterval = time.Minute
	// cleanRows is the maximum number of rows per statement. It keeps locks short.
	cleanRows = 1000
)

// SKIP LOCKED lets several processes delete different rows at the same time.
const cleanSQL = `
DELETE FROM {schema}idempotency_keys
WHERE (client, key) IN (
    SELECT client, key FROM {schema}idempotency_keys
    WHERE expires_at <= clock_timestamp()
    ORDER BY expires_at
    LIMIT $1
    FOR UPDATE SKIP LOCKED)`

// Run deletes expired responses periodically until ctx ends, and then returns nil.
func (k *Keeper) Run(ctx context.Context) error {
	for {
		if err := k.Clean(ctx); err != nil && ctx.Err() == nil && !postgres.IsUnavailable(err) {
			k.log.WarnContext(ctx, "deleting expired idempotency keys failed", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(cleanInterval):
		}
	}
}

// Clean deletes expired responses.
func (k *Keeper) Clean(ctx context.Context) error {
	for {
		result, err := k.db.ExecContext(ctx, k.sql(cleanSQL), cleanRows)
		if err != nil {
			return fmt.Errorf("delete expired idempotency keys: %w", err)
		}
		if rows, err := result.RowsAffected(); err != nil || rows < cleanRows {
			return err //nolint:wrapcheck // always nil with lib/pq
		}
	}
}
