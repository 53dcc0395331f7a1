package users

import (
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// Change is a change of a user. Fields that are nil stay the same.
type Change struct {
	ID                  uuid.UUID
	Email               *Email
	FirstName, LastName *Name
	// If is a condition on the present user. It may be nil.
	If func(User) bool
	// Traceparent is the optional trace context of the request. The delivery of the
	// event joins that trace.
	Traceparent outbox.Traceparent
}

// ParseChange parses the values that are not nil, or returns a *ValidationError with every
// broken rule. The result has no ID.
func ParseChange(email, firstName, lastName *string) (Change, error) {
	var (
		v validation
		c Change
	)
	c.Email = parsePresent(&v, "email", email, ParseEmail)
	c.FirstName = parsePresent(&v, "first_name", firstName, ParseName)
	c.LastName = parsePresent(&v, "last_name", lastName, ParseName)
	if err := v.err(); err != nil {
		return Change{}, err
	}
	return c, nil
}

func parsePresent[T any](v *validation, field string, text *string, parse func(string) (T, error)) *T {
	if text == nil {
		return nil
	}
	value, err := parse(*text)
	v.check(field, err)
	return &value
}

// Update changes users and publishes user_updated for each user that changes, in tx. It
// returns the results in the order of changes. The error of a result is nil, ErrNotFound,
// ErrModified or ErrEmailTaken. A change that sets only values that the user has leaves
// the user as it is.
//
// An address counts as taken if a user had it before Update, even if that user gets
// another address in the same call. If the error matches postgres.IsConflict, the caller may
// repeat the transaction.
func (s *Service) Update(ctx context.Context, tx *sqlx.Tx, changes []Change) ([]Result, error) {
	ids, addresses := make([]uuid.UUID, len(changes)), []string{}
	for i, c := range changes {
		ids[i] = c.ID
		if c.Email != nil {
			addresses = append(addresses, c.Email.key())
		}
	}
	current, err := s.lock(ctx, tx, ids)
	if err != nil {
		return nil, fmt.Errorf("update users: %w", err)
	}
	owners, err := s.selectOwners(ctx, tx, addresses)
	if err != nil {
		return nil, fmt.Errorf("update users: %w", err)
	}
	var events []outbox.Event
	changed := map[uuid.UUID]User{}
	results, now := make([]Result, len(changes)), time.Now()
	for i, c := range changes {
		before, exists := current[c.ID]
		after := c.apply(before)
		switch {
		case !exists:
			results[i].Err = ErrNotFound
		case c.If != nil && !c.If(before):
			results[i].Err = ErrModified
		case isOther(owners, after):
			results[i].Err = ErrEmailTaken
		case after == before:
			results[i].User = before
		default:
			after.UpdatedAt = before.nextUpdate(now)
			event, err := before.updated(after, c.Traceparent)
			if err != nil {
				return nil, fmt.Errorf("update users: %w", err)
			}
			events = append(events, event)
			owners[after.Email.key()] = after.ID
			current[c.ID], changed[c.ID], results[i].User = after, after, after
		}
	}
	if len(changed) == 0 {
		return results, nil
	}
	if err := s.publish(ctx, tx, events, func() error { return s.update(ctx, tx, changed) }); err != nil {
		return nil, fmt.Errorf("update users: %w", err)
	}
	return results, nil
}

// publish calls write and publishes the events.
func (s *Service) publish(ctx context.Context, tx *sqlx.Tx, events []outbox.Event, write func() error) error {
	failpoint.At(failpoint.PublishBefore)
	if err := write(); err != nil {
		return err
	}
	if err := s.publisher.Publish(ctx, tx, events...); err != nil {
		return err
	}
	failpoint.At(failpoint.PublishInserted)
	return nil
}

func isOther(owners map[string]uuid.UUID, u User) bool {
	owner, taken := owners[u.Email.key()]
	return taken && owner != u.ID
}

// apply returns the user with the values of the change.
func (c Change) apply(u User) User {
	if c.Email != nil {
		u.Email = *c.Email
	}
	if c.FirstName != nil {
		u.FirstName = *c.FirstName
	}
	if c.LastName != nil {
		u.LastName = *c.LastName
	}
	return u
}

// nextUpdate returns the time of the next change of the user. It is later than the last
// one, even if the clock was set back. So the times order the events of a user.
func (u User) nextUpdate(now time.Time) time.Time {
	next := now.UTC().Truncate(time.Microsecond)
	if !next.After(u.UpdatedAt) {
		return u.UpdatedAt.Add(time.Microsecond)
	}
	return next
}

// updated returns the user_updated event for the change to after.
func (u User) updated(after User, traceparent outbox.Traceparent) (outbox.Event, error) {
	changed := UserUpdated{UserID: u.ID.String()}
	if after.Email != u.Email {
		text := after.Email.String()
		changed.Changed.Email = &text
	}
	if after.FirstName != u.FirstName {
		text := after.FirstName.String()
		changed.Changed.FirstName = &text
	}
	if after.LastName != u.LastName {
		text := after.LastName.String()
		changed.Changed.LastName = &text
	}
	return outbox.NewEvent(changed, outbox.WithTime(after.UpdatedAt), outbox.WithTraceparent(traceparent))
}

// Deletion is the deletion of a user. The fields are those of Change.
type Deletion struct {
	ID          uuid.UUID
	If          func(User) bool
	Traceparent outbox.Traceparent
}

// Delete deletes users and publishes user_deleted for each of them, in tx. It returns an
// error for each deletion, in their order: nil or ErrModified. A user that does not exist
// counts as deleted.
func (s *Service) Delete(ctx context.Context, tx *sqlx.Tx, deletions []Deletion) ([]error, error) {
	ids := make([]uuid.UUID, len(deletions))
	for i, d := range deletions {
		ids[i] = d.ID
	}
	current, err := s.lock(ctx, tx, ids)
	if err != nil {
		return nil, fmt.Errorf("delete users: %w", err)
	}
	var events []outbox.Event
	var deleted []uuid.UUID
	errs, now := make([]error, len(deletions)), time.Now()
	for i, d := range deletions {
		user, exists := current[d.ID]
		if !exists {
			continue
		}
		if d.If != nil && !d.If(user) {
			errs[i] = ErrModified
			continue
		}
		event, err := outbox.NewEvent(UserDeleted{UserID: d.ID.String()},
			outbox.WithTime(user.nextUpdate(now)), outbox.WithTraceparent(d.Traceparent))
		if err != nil {
			return nil, fmt.Errorf("delete users: %w", err)
		}
		events, deleted = append(events, event), append(deleted, d.ID)
		delete(current, d.ID)
	}
	if len(deleted) == 0 {
		return errs, nil
	}
	if err := s.publish(ctx, tx, events, func() error { return s.delete(ctx, tx, deleted) }); err != nil {
		return nil, fmt.Errorf("delete users: %w", err)
	}
	return errs, nil
}
