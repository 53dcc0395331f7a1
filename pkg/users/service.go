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

// Service creates, finds, changes and deletes users. It is safe for concurrent use.
type Service struct {
	db        *sqlx.DB
	publisher *outbox.Publisher
	sql       func(string) string // adds the schema to a statement
}

// Options configures a Service.
type Options struct {
	// DB is the pool for reads.
	DB *sqlx.DB
	// Publisher publishes the events.
	Publisher *outbox.Publisher
	// Schema is the schema of the table users. If it is empty, the session's
	// search_path applies.
	Schema string
}

// NewService returns a Service.
func NewService(o Options) *Service {
	return &Service{db: o.DB, publisher: o.Publisher, sql: postgres.InSchema(o.Schema)}
}

// NewUser is the input of Create.
type NewUser struct {
	// Email is required.
	Email Email
	// FirstName and LastName can be empty.
	FirstName, LastName Name
	// Traceparent is the optional trace context of the request. The delivery of the
	// event joins that trace.
	Traceparent outbox.Traceparent
}

// ParseNewUser parses the values, or returns a *ValidationError with every broken rule.
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

// Create inserts the user and publishes user_created in tx.
//
// After ErrEmailTaken, tx remains usable. After any other error, the caller must roll
// back tx.
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

// Result is the result of CreateMany or Update for one user. If Err is not nil, User is
// the zero value.
type Result struct {
	User User
	Err  error
}

// ManyOptions are the options of CreateMany. The zero value is usable.
type ManyOptions struct {
	// LockTimeout limits the wait for another transaction that inserts one of the
	// addresses. 0 means the session's limit.
	LockTimeout time.Duration
	// Companion returns SQL that CreateMany executes with its statement. The parameters
	// of that SQL are numbered from firstParameter. The users that its condition excludes
	// get ErrEmailTaken, too, although their addresses may be free. It may be nil.
	Companion func(users []User, firstParameter int) (postgres.Companion, error)
}

// CreateMany creates several users as Create does, and returns the results in the order
// of news. The error of a result is nil or ErrEmailTaken. If two users have the same
// address, the second gets ErrEmailTaken.
// CreateMany runs one statement, so q can be a transaction or a connection in
// autocommit mode. If q is a transaction, the caller must roll it back after an error.
func (s *Service) CreateMany(ctx context.Context, q outbox.Queryer, news []NewUser, o ManyOptions) ([]Result, error) {
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
	var companion postgres.Companion
	if o.Companion != nil {
		var err error
		if companion, err = o.Companion(users, insertManyParameters+1); err != nil {
			return nil, fmt.Errorf("create users: %w", err)
		}
	}
	// All calls lock addresses in the same order to prevent deadlocks.
	inOrder := slices.SortedStableFunc(slices.Values(users), func(a, b User) int { return cmp.Compare(a.Email.key(), b.Email.key()) })
	insert := s.insertMany(inOrder, o.LockTimeout, companion)
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

// make returns a user with a new id and the given time of creation.
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

// created returns the user_created event.
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
	// MaxLimit is the maximum number of users per page.
	MaxLimit = 100
	// DefaultLimit is the number of users per page for the zero ListParams.
	DefaultLimit = 20
)

// ListParams selects a page of users. Every value is valid. The zero value selects the
// first page of all users.
type ListParams struct {
	email  Email
	limit  int       // 0 only in the zero value
	before uuid.UUID // exclusive upper bound of the page's ids
}

// ParseListParams parses the parameters of a list, or returns a *ValidationError with
// every broken rule. email selects the user with that address, ignoring case. An empty
// email selects all users. limit is the maximum number of users, from 1 to MaxLimit.
// cursor is the NextCursor of the previous page. An empty cursor selects the first page.
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

// Page is a page of a list.
type Page struct {
	Users []User
	// NextCursor is the cursor of the next page. It is empty on the last page.
	NextCursor string
}

// List returns users, newest first. A client that follows the cursors sees every user
// that existed at its first request exactly once, even if users are created meanwhile.
func (s *Service) List(ctx context.Context, p ListParams) (Page, error) {
	if p.limit == 0 {
		p.limit, p.before = DefaultLimit, uuid.Max
	}
	// One additional user shows whether another page follows.
	users, err := s.selectPage(ctx, p.email, p.before, p.limit+1)
	if err != nil {
		return Page{}, fmt.Errorf("list users: %w", err)
	}
	if len(users) <= p.limit {
		return Page{Users: users}, nil
	}
	return Page{Users: users[:p.limit], NextCursor: formatCursor(users[p.limit-1].ID)}, nil
}
