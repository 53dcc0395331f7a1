// Package users creates, finds, changes and deletes users. The change of a user and its
// event commit in one PostgreSQL transaction.
package users

import (
	"errors"
	"slices"
	"time"

	"github.com/google/uuid"
)

// User is a stored user.
type User struct {
	// ID is a UUID v7. Ids increase with the time of creation.
	ID uuid.UUID
	// Email is unique, ignoring case. The case of its local part is kept, and its
	// domain is in lower case.
	Email Email
	// FirstName and LastName can be empty.
	FirstName, LastName Name
	// CreatedAt and UpdatedAt are in UTC and truncated to microseconds, the precision
	// of PostgreSQL.
	CreatedAt, UpdatedAt time.Time
}

// UserCreated is the event context of user_created. The name of this type determines
// the event type. Consumers read the event context and the event type. A change to
// either requires a new metadata version.
type UserCreated struct {
	UserID    string `json:"user_id"`
	Email     string `json:"email"`
	FirstName string `json:"first_name"`
	LastName  string `json:"last_name"`
}

// UserUpdated is the event context of user_updated.
type UserUpdated struct {
	UserID string `json:"user_id"`
	// Changed contains the new values of the fields that have changed.
	Changed struct {
		Email     *string `json:"email,omitempty"`
		FirstName *string `json:"first_name,omitempty"`
		LastName  *string `json:"last_name,omitempty"`
	} `json:"changed"`
}

// UserDeleted is the event context of user_deleted. It has no personal data but the id.
type UserDeleted struct {
	UserID string `json:"user_id"`
}

// eventTypes are the types of the events about users.
var eventTypes = []string{"user_created", "user_updated", "user_deleted"}

// IsEventType reports whether an event of this type is about a user of this service, so
// that clients must not publish it.
func IsEventType(eventType string) bool { return slices.Contains(eventTypes, eventType) }

var (
	// ErrEmailTaken means that a user with this address exists, ignoring case.
	ErrEmailTaken = errors.New("user with this email already exists")
	// ErrNotFound means that no user has the id.
	ErrNotFound = errors.New("user not found")
	// ErrModified means that the user does not meet the condition of a change.
	ErrModified = errors.New("user was modified")
)
