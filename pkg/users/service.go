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

// NewUser is a user to be created.
type NewUser struct {
	// Email is required.
	Email Email
	// FirstName and LastName may be empty.
	FirstName, LastName Name
	// Traceparent is the trace context of the request, if there is one. The event's
	// delivery joins that trace.
	Traceparent outbox.Traceparent
}

// ParseNewUser returns the user with these values, or a *ValidationError with every
// rule that they break.
func ParseNewUser(email, firstName, lastName string) (NewUser, error) {
	var (
		v   validation
		n   NewUser
		err error
	)
	n.Email, err = ParseEmail(email)
	v.check("email", err)
	n.FirstName, err = ParseName(firstName)
	v.check("first_name", err)
	n.LastName, err = ParseName(lastName)
	v.check("last_name", err)
	if err := v.err(); err != nil {
		return NewUser{}, err
	}
	return n, nil
}

// Create stores the user and publishes user_created in tx: both are there once
// tx commits, or neither.
//
// After ErrEmailTaken tx can go on. After any other error it must be rolled back.
func (s *Service) Create(ctx context.Context, tx *sqlx.Tx, n NewUser) (User, error) {
	user := n.make(time.Now())
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

// Result is what became of one of several users: it was created, or Err is
// ErrEmailTaken.
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
	if len(news) == 0 {
		return nil, nil
	}
	now := time.Now()
	users, events, ids := make([]User, len(news)), make([]outbox.Event, len(news)), make([]uuid.UUID, len(news))
	for i, n := range news {
		users[i] = n.make(now)
		event, err := users[i].created(n.Traceparent)
		if err != nil {
			return nil, fmt.Errorf("create users: %w", err)
		}
		events[i], ids[i] = event, users[i].ID
	}
	// All take their locks in one order, so that two calls with the same
	// addresses do not wait for each other.
	inOrder := slices.SortedStableFunc(slices.Values(users), func(a, b User) int { return cmp.Compare(a.Email.key(), b.Email.key()) })
	insert := s.insertMany(inOrder, lockTimeout)
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
	results := make([]Result, len(users))
	for i, user := range users {
		if created[user.ID] {
			results[i].User = user
		} else {
			results[i].Err = ErrEmailTaken
		}
	}
	return results, nil
}

// make returns the user that is created at that time.
func (n NewUser) make(at time.Time) User {
	created := at.UTC().Truncate(time.Microsecond)
	return User{
		ID:        uuid.Must(uuid.NewV7()), // crypto/rand does not fail since Go 1.24
		Email:     n.Email,
		FirstName: n.FirstName,
		LastName:  n.LastName,
		CreatedAt: created,
		UpdatedAt: created,
	}
}

// created returns the event of the user's creation.
func (u User) created(traceparent outbox.Traceparent) (outbox.Event, error) {
	return outbox.NewEvent(
		UserCreated{
			UserID:    u.ID.String(),
			Email:     u.Email.String(),
			FirstName: u.FirstName.String(),
			LastName:  u.LastName.String(),
		},
		outbox.WithTime(u.CreatedAt),
		outbox.WithTraceparent(traceparent),
	)
}

// Get returns the user with the id, or ErrNotFound.
func (s *Service) Get(ctx context.Context, id uuid.UUID) (User, error) {
	user, err := s.selectByID(ctx, id)
	if err != nil {
		return User{}, fmt.Errorf("get user: %w", err)
	}
	return user, nil
}

const (
	// MaxLimit bounds the users of a page.
	MaxLimit = 100
	// DefaultLimit is the most users of a page when ListParams are zero.
	DefaultLimit = 20
)

// ListParams say which users to list. Every value is valid; the zero value is the
// first page of all users.
type ListParams struct {
	email  Email
	limit  int       // 0 in the zero value only
	before uuid.UUID // the page's ids are below it
}

// ParseListParams returns the parameters of a list, or a *ValidationError with every
// rule that they break. An email selects the user with that address, in whatever
// case; empty selects all. limit is the most users in a page, from 1 to MaxLimit.
// cursor is the NextCursor of the page before; empty is the first page.
func ParseListParams(email string, limit int, cursor string) (ListParams, error) {
	var (
		v   validation
		p   = ListParams{limit: limit}
		err error
	)
	if email != "" {
		p.email, err = ParseEmail(email)
		v.check("email", err)
	}
	if limit < 1 || limit > MaxLimit {
		v.check("limit", fmt.Errorf("must be from 1 to %d", MaxLimit))
	}
	p.before, err = parseCursor(cursor)
	v.check("cursor", err)
	if err := v.err(); err != nil {
		return ListParams{}, err
	}
	return p, nil
}

// Page is a part of a list.
type Page struct {
	Users []User
	// NextCursor gets the page after this one; it is empty if this is the last one.
	NextCursor string
}

// List returns users, the newest first. Following the cursors shows every user
// that existed when the first page was read exactly once, whatever is created
// meanwhile.
func (s *Service) List(ctx context.Context, p ListParams) (Page, error) {
	if p.limit == 0 {
		p.limit, p.before = DefaultLimit, uuid.Max
	}
	// One more than asked for tells whether another page follows.
	users, err := s.selectPage(ctx, p.email, p.before, p.limit+1)
	if err != nil {
		return Page{}, fmt.Errorf("list users: %w", err)
	}
	if len(users) <= p.limit {
		return Page{Users: users}, nil
	}
	return Page{Users: users[:p.limit], NextCursor: formatCursor(users[p.limit-1].ID)}, nil
}
