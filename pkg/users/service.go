package users

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// Service is the use cases around users. It is safe for concurrent use.
type Service struct {
	db        *sqlx.DB
	publisher *outbox.Publisher
	sql       func(string) string // puts the schema into a statement
}

// Options configure a Service.
type Options struct {
	// DB is where users are read.
	DB *sqlx.DB
	// Publisher writes the events.
	Publisher *outbox.Publisher
	// Schema is the schema of the table of users. If it is empty, the table is found by
	// the session's search_path.
	Schema string
}

// NewService returns a Service.
func NewService(o Options) *Service {
	return &Service{db: o.DB, publisher: o.Publisher, sql: postgres.InSchema(o.Schema)}
}

// NewUser is what Create makes a user of.
type NewUser struct {
	// Email is required: a bare ASCII address of at most MaxEmailBytes.
	// Surrounding space is dropped.
	Email string
	// FirstName and LastName may be empty. Each is valid UTF-8 without control
	// characters, of at most MaxNameLength. Surrounding space is dropped.
	FirstName, LastName string
	// Traceparent is the trace context of the request, if there is one. The event's
	// delivery joins that trace.
	Traceparent outbox.Traceparent
}

// Create stores the user and publishes user_created in tx: both are there once
// tx commits, or neither.
//
// It returns a *ValidationError with every rule that is broken, or
// ErrEmailTaken; then tx can go on. After any other error it must be rolled
// back.
func (s *Service) Create(ctx context.Context, tx *sqlx.Tx, n NewUser) (User, error) {
	user, err := n.make(time.Now())
	if err != nil {
		return User{}, err
	}
	event, err := user.created(n.Traceparent)
	if err != nil {
		return User{}, fmt.Errorf("create user: %w", err)
	}
	if err := s.insert(ctx, tx, user); err != nil {
		return User{}, fmt.Errorf("create user: %w", err)
	}
	failpoint.At(failpoint.PublishBefore)
	if err := s.publisher.Publish(ctx, tx, event); err != nil {
		return User{}, fmt.Errorf("create user: %w", err)
	}
	failpoint.At(failpoint.PublishInserted)
	return user, nil
}

// Result is what became of one of several users: it was created, or an error
// says why not, a *ValidationError or ErrEmailTaken.
type Result struct {
	User User
	Err  error
}

// CreateMany does what Create does for each of the users, in their order: of
// two with one address the second finds it taken. The results are in the same
// order. It runs one statement: q is a transaction, or a connection on which that
// is a transaction by itself. Where lockTimeout is not 0 it fails after a wait for
// another transaction with one of the addresses that takes longer. After an error
// a transaction must be rolled back.
func (s *Service) CreateMany(ctx context.Context, q outbox.Queryer, news []NewUser, lockTimeout time.Duration) ([]Result, error) {
	results := make([]Result, len(news))
	now := time.Now()
	valid := make([]int, 0, len(news)) // places among news
	for i, n := range news {
		results[i].User, results[i].Err = n.make(now)
		if results[i].Err == nil {
			valid = append(valid, i)
		}
	}
	if len(valid) == 0 {
		return results, nil
	}
	events, ids := make([]outbox.Event, len(valid)), make([]uuid.UUID, len(valid))
	for i, place := range valid {
		user := results[place].User
		event, err := user.created(news[place].Traceparent)
		if err != nil {
			return nil, fmt.Errorf("create users: %w", err)
		}
		events[i], ids[i] = event, user.ID
	}
	// All take their locks in one order, so that two calls with the same
	// addresses do not wait for each other.
	slices.SortStableFunc(valid, func(a, b int) int {
		return cmp.Compare(emailKey(results[a].User.Email), emailKey(results[b].User.Email))
	})
	users := make([]User, len(valid))
	for i, place := range valid {
		users[i] = results[place].User
	}
	insert := s.insertMany(users, lockTimeout)
	insert.RowIDs = ids
	failpoint.At(failpoint.PublishBefore)
	inserted, err := s.publisher.PublishInserted(ctx, q, insert, events...)
	if err != nil {
		return nil, fmt.Errorf("create users: %w", err)
	}
	failpoint.At(failpoint.PublishInserted)
	created := make(map[uuid.UUID]bool, len(inserted))
	for _, id := range inserted {
		created[id] = true
	}
	for _, place := range valid {
		if !created[results[place].User.ID] {
			results[place] = Result{Err: ErrEmailTaken}
		}
	}
	return results, nil
}

// make returns the user that is created at that time.
func (n NewUser) make(at time.Time) (User, error) {
	user, err := n.normalized()
	if err != nil {
		return User{}, err
	}
	if user.ID, err = uuid.NewV7(); err != nil {
		return User{}, fmt.Errorf("make a user id: %w", err)
	}
	user.CreatedAt = at.UTC().Truncate(time.Microsecond)
	user.UpdatedAt = user.CreatedAt
	return user, nil
}

// created returns the event of the user's creation.
func (u User) created(traceparent outbox.Traceparent) (outbox.Event, error) {
	return outbox.NewEvent(
		UserCreated{
			UserID:    u.ID.String(),
			Email:     u.Email,
			FirstName: u.FirstName,
			LastName:  u.LastName,
		},
		outbox.WithTime(u.CreatedAt),
		outbox.WithTraceparent(traceparent),
	)
}

// Validate returns a *ValidationError with every rule that is broken, or nil:
// what Create returns for them without looking further.
func (n NewUser) Validate() error {
	_, err := n.normalized()
	return err
}

// normalized returns the user without what only a new one gets: id and times.
func (n NewUser) normalized() (User, error) {
	var (
		v    validation
		user User
		err  error
	)
	user.Email, err = normalizeEmail(n.Email)
	v.check("email", err)
	user.FirstName, err = normalizeName(n.FirstName)
	v.check("first_name", err)
	user.LastName, err = normalizeName(n.LastName)
	v.check("last_name", err)
	return user, v.err()
}

// Get returns the user with the id, or ErrNotFound.
func (s *Service) Get(ctx context.Context, id uuid.UUID) (User, error) {
	user, err := s.selectByID(ctx, id)
	if err != nil {
		return User{}, fmt.Errorf("get user: %w", err)
	}
	return user, nil
}

// MaxLimit bounds ListParams.Limit.
const MaxLimit = 100

// ListParams say which users to list.
type ListParams struct {
	// Email, where given, is the address of the only user to list, in
	// whatever case.
	Email string
	// Limit is the most users in a page, from 1 to MaxLimit.
	Limit int
	// Cursor is the NextCursor of the page before; empty for the first page.
	Cursor string
}

// Page is a part of a list.
type Page struct {
	Users []User
	// NextCursor gets the page after this one; empty where this is the last.
	NextCursor string
}

// List returns users, the newest first. Following the cursors shows every user
// that existed when the first page was read exactly once, whatever is created
// meanwhile. It returns a *ValidationError with every rule that is broken.
func (s *Service) List(ctx context.Context, p ListParams) (Page, error) {
	email, before, err := p.parse()
	if err != nil {
		return Page{}, err
	}

	// One more than asked for tells whether another page follows.
	users, err := s.selectPage(ctx, email, before, p.Limit+1)
	if err != nil {
		return Page{}, fmt.Errorf("list users: %w", err)
	}
	if len(users) <= p.Limit {
		return Page{Users: users}, nil
	}
	return Page{Users: users[:p.Limit], NextCursor: formatCursor(users[p.Limit-1].ID)}, nil
}

// Validate returns a *ValidationError with every rule that is broken, or nil:
// what List returns for them without looking further.
func (p ListParams) Validate() error {
	_, _, err := p.parse()
	return err
}

// parse returns the address to look for, or an empty string, and the id that
// the page's ids are below.
func (p ListParams) parse() (email string, before uuid.UUID, err error) {
	var v validation
	if p.Email != "" {
		email, err = normalizeEmail(p.Email)
		v.check("email", err)
	}
	if p.Limit < 1 || p.Limit > MaxLimit {
		v.check("limit", fmt.Errorf("must be from 1 to %d", MaxLimit))
	}
	before, err = parseCursor(p.Cursor)
	v.check("cursor", err)
	return email, before, v.err()
}
