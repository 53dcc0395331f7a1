// Package users creates users and finds them. A user and the event that says
// so come into being in one PostgreSQL transaction: there is never one without
// the other.
package users

import (
	"errors"
	"time"

	"github.com/google/uuid"
)

// User is a stored user.
type User struct {
	// ID is a UUID v7: ids rise with the time of creation.
	ID uuid.UUID
	// Email is unique whatever the case of its letters. Its local part stands
	// as it was given, its domain in lower case.
	Email Email
	// FirstName and LastName are empty if none was given.
	FirstName, LastName Name
	// CreatedAt and UpdatedAt are in UTC and have PostgreSQL's precision of
	// microseconds: what Create returns is what is read later.
	CreatedAt, UpdatedAt time.Time
}

// UserCreated is what a user_created event carries: the event's type is this
// type's name, its context these fields. Consumers read both; a change to
// either is a new metadata version.
type UserCreated struct {
	UserID    string `json:"user_id"`
	Email     string `json:"email"`
	FirstName string `json:"first_name"`
	LastName  string `json:"last_name"`
}

var (
	// ErrEmailTaken says that a user with this address exists, in whatever
	// case it is written. Nothing was created.
	ErrEmailTaken = errors.New("user with this email already exists")
	// ErrNotFound says that no user has the id.
	ErrNotFound = errors.New("user not found")
)
