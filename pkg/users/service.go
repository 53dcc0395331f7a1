package users

import (
	"context"
	"fmt"
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
	hint      func()
}

// Options configure a Service.
type Options struct {
	// DB is where users and the outbox live.
	DB *sqlx.DB
	// Publisher writes the events.
	Publisher *outbox.Publisher
	// Hint is called after an event was committed, so that it is delivered at
	// once and not with the relay's next poll. It must not block; nil is none.
	Hint func()
}

// NewService returns a Service.
func NewService(o Options) *Service {
	if o.Hint == nil {
		o.Hint = func() {}
	}
	return &Service{db: o.DB, publisher: o.Publisher, hint: o.Hint}
}

// NewUser is what Create makes a user of.
type NewUser struct {
	// Email is required: a bare ASCII address of at most MaxEmailBytes.
	// Surrounding space is dropped.
	Email string
	// FirstName and LastName may be empty. Each is valid UTF-8 without control
	// characters, of at most MaxNameLength. Surrounding space is dropped.
	FirstName, LastName string
	// Traceparent is the W3C trace context of the request, or empty. The
	// event's delivery joins that trace.
	Traceparent string
}

// Create stores the user and publishes user_created, both or neither.
//
// It returns a *ValidationError with every rule that is broken, or
// ErrEmailTaken. An error that wraps postgres.ErrOutcomeUnknown means that the
// connection was lost while the transaction was being committed: the user may
// exist, with its event, or not, without; looking for the address tells. After
// any other error nothing was created.
func (s *Service) Create(ctx context.Context, n NewUser) (User, error) {
	user, err := n.normalized()
	if err != nil {
		return User{}, err
	}
	user.ID, err = uuid.NewV7()
	if err != nil {
		return User{}, fmt.Errorf("make a user id: %w", err)
	}
	user.CreatedAt = time.Now().UTC().Truncate(time.Microsecond)
	user.UpdatedAt = user.CreatedAt
	event, err := outbox.NewEvent(
		UserCreated{
			UserID:    user.ID.String(),
			Email:     user.Email,
			FirstName: user.FirstName,
			LastName:  user.LastName,
		},
		outbox.WithTime(user.CreatedAt),
		outbox.WithTraceparent(n.Traceparent),
	)
	if err != nil {
		return User{}, fmt.Errorf("create user: %w", err)
	}
	err = postgres.InTx(ctx, s.db, func(tx *sqlx.Tx) error {
		if err := insert(ctx, tx, user); err != nil {
			return err
		}
		return s.publisher.Publish(ctx, tx, event)
	})
	if err != nil {
		return User{}, fmt.Errorf("create user: %w", err)
	}
	failpoint.At(failpoint.PublishCommitted)
	s.hint()
	return user, nil
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
	user, err := selectByID(ctx, s.db, id)
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
	users, err := selectPage(ctx, s.db, email, before, p.Limit+1)
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
