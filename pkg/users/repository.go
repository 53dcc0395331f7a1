package users

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// The index users_email_key decides whether an address is taken. ON CONFLICT checks the
// index before the insert writes a row, and waits for a concurrent insert of the same
// address. A duplicate causes no record in the server's error log.
const insertSQL = `
INSERT INTO {schema}users (id, email, first_name, last_name, created_at, updated_at)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (lower(email)) DO NOTHING`

// Inserts in the order of the arrays. $6 is the lock timeout, or NULL for the session's
// lock timeout. The statement sets lock_timeout before it inserts the first row. It also
// sets synchronous_commit, because it can be its own transaction: behind a pooler that
// shares sessions, the session's value can be that of another client. The condition
// selects the users to insert.
func insertManySQL(condition string) string {
	return `
INSERT INTO {schema}users (id, email, first_name, last_name, created_at, updated_at)
SELECT id, email, first_name, last_name, $5::timestamptz, $5::timestamptz
FROM (SELECT set_config('lock_timeout', coalesce($6::text, current_setting('lock_timeout')), true),
             set_config('synchronous_commit', 'on', true)) AS setting,
     unnest($1::uuid[], $2::text[], $3::text[], $4::text[]) AS u (id, email, first_name, last_name)
WHERE ` + condition + `
ON CONFLICT (lower(email)) DO NOTHING
RETURNING id`
}

// insertManyParameters is the number of parameters of insertManySQL.
const insertManyParameters = 6

const selectByIDSQL = `
SELECT id, email, first_name, last_name, created_at, updated_at
FROM {schema}users
WHERE id = $1`

// Scans the primary key backwards from $1.
const selectPageSQL = `
SELECT id, email, first_name, last_name, created_at, updated_at
FROM {schema}users
WHERE id < $1
ORDER BY id DESC
LIMIT $2`

// Finds at most one row by the index users_email_key.
const selectPageByEmailSQL = `
SELECT id, email, first_name, last_name, created_at, updated_at
FROM {schema}users
WHERE lower(email) = $3 AND id < $1
ORDER BY id DESC
LIMIT $2`

// insert returns ErrEmailTaken if a user with the address exists.
func (s *Service) insert(ctx context.Context, tx *sqlx.Tx, u User) error {
	result, err := tx.ExecContext(ctx, s.sql(insertSQL),
		u.ID, u.Email.String(), u.FirstName.String(), u.LastName.String(), u.CreatedAt, u.UpdatedAt)
	if err != nil {
		return err //nolint:wrapcheck // Create wraps it
	}
	inserted, err := result.RowsAffected()
	if err != nil {
		return err //nolint:wrapcheck // Create wraps it
	}
	if inserted == 0 {
		return ErrEmailTaken
	}
	return nil
}

// insertMany returns the statement that inserts the users whose addresses are not taken.
// All users must have the same time of creation.
func (s *Service) insertMany(users []User, lockTimeout time.Duration, c postgres.Companion) outbox.Insert {
	n := len(users)
	ids, emails, firstNames, lastNames := make(pq.StringArray, n), make(pq.StringArray, n), make(pq.StringArray, n), make(pq.StringArray, n)
	for i, u := range users {
		ids[i], emails[i], firstNames[i], lastNames[i] = u.ID.String(), u.Email.String(), u.FirstName.String(), u.LastName.String()
	}
	var timeout any
	if lockTimeout > 0 {
		timeout = strconv.FormatInt(lockTimeout.Milliseconds(), 10)
	}
	return outbox.Insert{
		SQL:        s.sql(insertManySQL(cmp.Or(c.Condition, "true"))),
		Args:       append([]any{ids, emails, firstNames, lastNames, users[0].CreatedAt, timeout}, c.Args...),
		Additional: c.Insert,
	}
}

// All transactions lock users in the same order to prevent deadlocks.
const lockUsersSQL = `
SELECT id, email, first_name, last_name, created_at, updated_at
FROM {schema}users
WHERE id = ANY ($1::uuid[])
ORDER BY id
FOR UPDATE`

const selectOwnersSQL = `
SELECT id, lower(email) AS email
FROM {schema}users
WHERE lower(email) = ANY ($1::text[])`

const updateSQL = `
UPDATE {schema}users AS u
SET email = c.email, first_name = c.first_name, last_name = c.last_name, updated_at = c.updated_at
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::timestamptz[])
     AS c (id, email, first_name, last_name, updated_at)
WHERE u.id = c.id`

const deleteSQL = `DELETE FROM {schema}users WHERE id = ANY ($1::uuid[])`

// lock returns the users that exist. No other transaction can change them until tx ends.
func (s *Service) lock(ctx context.Context, tx *sqlx.Tx, ids []uuid.UUID) (map[uuid.UUID]User, error) {
	var rows []row
	if err := tx.SelectContext(ctx, &rows, s.sql(lockUsersSQL), textArray(ids)); err != nil {
		return nil, err //nolint:wrapcheck // the caller wraps it
	}
	users := make(map[uuid.UUID]User, len(rows))
	for _, r := range rows {
		users[r.ID] = r.user()
	}
	return users, nil
}

// selectOwners returns the ids of the users that have the addresses. The addresses are the
// results of key.
func (s *Service) selectOwners(ctx context.Context, tx *sqlx.Tx, addresses []string) (map[string]uuid.UUID, error) {
	owners := map[string]uuid.UUID{}
	if len(addresses) == 0 {
		return owners, nil
	}
	var rows []row
	if err := tx.SelectContext(ctx, &rows, s.sql(selectOwnersSQL), pq.StringArray(addresses)); err != nil {
		return nil, err //nolint:wrapcheck // the caller wraps it
	}
	for _, r := range rows {
		owners[r.Email] = r.ID
	}
	return owners, nil
}

// update writes the users' values. If another transaction has inserted one of the addresses
// since selectOwners, the error is postgres.ErrConflict.
func (s *Service) update(ctx context.Context, tx *sqlx.Tx, changed map[uuid.UUID]User) error {
	n := len(changed)
	ids, emails, times := make(pq.StringArray, 0, n), make(pq.StringArray, 0, n), make(pq.StringArray, 0, n)
	firstNames, lastNames := make(pq.StringArray, 0, n), make(pq.StringArray, 0, n)
	byAddress := func(a, b User) int { return cmp.Compare(a.Email.key(), b.Email.key()) }
	for _, u := range slices.SortedFunc(maps.Values(changed), byAddress) { // a usual order, to prevent deadlocks
		ids, emails = append(ids, u.ID.String()), append(emails, u.Email.String())
		firstNames, lastNames = append(firstNames, u.FirstName.String()), append(lastNames, u.LastName.String())
		times = append(times, u.UpdatedAt.Format(time.RFC3339Nano))
	}
	_, err := tx.ExecContext(ctx, s.sql(updateSQL), ids, emails, firstNames, lastNames, times)
	if postgres.IsUniqueViolation(err, "users_email_key") {
		return fmt.Errorf("%w: %w", postgres.ErrConflict, err)
	}
	return err //nolint:wrapcheck // the caller wraps it
}

func (s *Service) delete(ctx context.Context, tx *sqlx.Tx, ids []uuid.UUID) error {
	_, err := tx.ExecContext(ctx, s.sql(deleteSQL), textArray(ids))
	return err //nolint:wrapcheck // the caller wraps it
}

func textArray(ids []uuid.UUID) pq.StringArray {
	texts := make(pq.StringArray, len(ids))
	for i, id := range ids {
		texts[i] = id.String()
	}
	return texts
}

// row is a row of the table users.
type row struct {
	ID        uuid.UUID `db:"id"`
	Email     string    `db:"email"`
	FirstName string    `db:"first_name"`
	LastName  string    `db:"last_name"`
	CreatedAt time.Time `db:"created_at"`
	UpdatedAt time.Time `db:"updated_at"`
}

// user converts the row. Stored values are not validated again. Times are converted from
// the session's time zone to UTC.
func (r row) user() User {
	return User{
		ID:        r.ID,
		Email:     Email{address: r.Email},
		FirstName: Name{text: r.FirstName},
		LastName:  Name{text: r.LastName},
		CreatedAt: r.CreatedAt.UTC(),
		UpdatedAt: r.UpdatedAt.UTC(),
	}
}

func (s *Service) selectByID(ctx context.Context, id uuid.UUID) (User, error) {
	var r row
	err := s.db.GetContext(ctx, &r, s.sql(selectByIDSQL), id)
	if errors.Is(err, sql.ErrNoRows) {
		return User{}, ErrNotFound
	}
	return r.user(), err
}

// selectPage returns up to limit users with ids below before, highest id first. With an
// email, it returns only the user with that address.
func (s *Service) selectPage(ctx context.Context, email Email, before uuid.UUID, limit int) ([]User, error) {
	query, args := selectPageSQL, []any{before, limit}
	if !email.IsZero() {
		query, args = selectPageByEmailSQL, append(args, email.key())
	}
	var rows []row
	if err := s.db.SelectContext(ctx, &rows, s.sql(query), args...); err != nil {
		return nil, err //nolint:wrapcheck // List wraps it
	}
	users := make([]User, len(rows))
	for i, r := range rows {
		users[i] = r.user()
	}
	return users, nil
}
