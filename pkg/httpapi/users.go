package httpapi

import (
	"net/http"
	"time"

	"github.com/google/uuid"
	"github.com/labstack/echo/v4"

	"github.com/diehard-outbox/diehard/pkg/users"
)

// defaultPageSize is the limit of a list that names none.
const defaultPageSize = 20

// user is a user on the wire.
type user struct {
	ID        uuid.UUID `json:"id"`
	Email     string    `json:"email"`
	FirstName string    `json:"first_name"`
	LastName  string    `json:"last_name"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
}

// userPage is a page of users on the wire.
type userPage struct {
	Data       []user  `json:"data"`
	NextCursor *string `json:"next_cursor"`
}

func (s *Server) createUser(c echo.Context) error {
	body, err := s.readObject(c)
	if err != nil {
		return err
	}
	newUser := users.NewUser{
		Email:       body.requiredString("email"),
		FirstName:   body.optionalString("first_name"),
		LastName:    body.optionalString("last_name"),
		Traceparent: requestOf(c).traceparent,
	}
	if err := body.check(newUser.Validate()); err != nil {
		return err
	}
	created, err := s.users.Create(c.Request().Context(), newUser)
	if err != nil {
		return err
	}
	c.Response().Header().Set(echo.HeaderLocation, "/v1/users/"+created.ID.String())
	return writeJSON(c, http.StatusCreated, echo.MIMEApplicationJSON, user(created))
}

func (s *Server) getUser(c echo.Context) error {
	// What is no id names no user. Only the canonical form is an id: a resource
	// has one address.
	id, err := uuid.Parse(c.Param("id"))
	if err != nil || id.String() != c.Param("id") {
		return users.ErrNotFound
	}
	found, err := s.users.Get(c.Request().Context(), id)
	if err != nil {
		return err
	}
	return writeJSON(c, http.StatusOK, echo.MIMEApplicationJSON, user(found))
}

func (s *Server) listUsers(c echo.Context) error {
	query, err := readQuery(c)
	if err != nil {
		return err
	}
	params := users.ListParams{
		Email:  query.text("email"),
		Limit:  query.integer("limit", defaultPageSize),
		Cursor: query.text("cursor"),
	}
	if err := query.check(params.Validate()); err != nil {
		return err
	}
	page, err := s.users.List(c.Request().Context(), params)
	if err != nil {
		return err
	}
	answer := userPage{Data: make([]user, len(page.Users))}
	for i, u := range page.Users {
		answer.Data[i] = user(u)
	}
	if page.NextCursor != "" {
		answer.NextCursor = &page.NextCursor
	}
	return writeJSON(c, http.StatusOK, echo.MIMEApplicationJSON, answer)
}
