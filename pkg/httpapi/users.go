package httpapi

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/labstack/echo/v4"

	"github.com/diehard-outbox/diehard/pkg/groupcommit"
	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/users"
)

// user is the JSON of a user.
type user struct {
	ID        uuid.UUID `json:"id"`
	Email     string    `json:"email"`
	FirstName string    `json:"first_name"`
	LastName  string    `json:"last_name"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
}

// wireUser returns the JSON of the user.
func wireUser(u users.User) user {
	return user{
		ID:        u.ID,
		Email:     u.Email.String(),
		FirstName: u.FirstName.String(),
		LastName:  u.LastName.String(),
		CreatedAt: u.CreatedAt,
		UpdatedAt: u.UpdatedAt,
	}
}

// userPage is the JSON of a page of users.
type userPage struct {
	Data       []user  `json:"data"`
	NextCursor *string `json:"next_cursor"`
}

// userResult is the JSON of the result for one user of a batch.
type userResult struct {
	Status  int              `json:"status"`
	User    *user            `json:"user,omitzero"`
	Problem *problem.Details `json:"problem,omitzero"`
}

func (s *Server) createUser(c echo.Context, body *input.Object) error {
	newUser, broken := readUser(c, body)
	if err := body.Check(broken); err != nil {
		return err
	}
	response := func(created users.User, err error) (idempotency.Response, error) {
		if err != nil {
			return idempotency.Response{}, err
		}
		return responseOf(http.StatusCreated, "/v1/users/"+created.ID.String(), wireUser(created))
	}
	ctx := c.Request().Context()
	return s.changeInGroup(c, body.Raw(), func() (idempotency.Response, error) {
		result, err := s.creations.Do(ctx, newUser)
		return response(result.User, cmp.Or(err, result.Err))
	}, func(tx *sqlx.Tx) (idempotency.Response, error) {
		return response(s.users.Create(ctx, tx, newUser))
	})
}

// createGroup creates the users of independent requests in one transaction.
func (s *Server) createGroup(ctx context.Context, newUsers []users.NewUser) (results []users.Result, err error) {
	err = postgres.InStatement(ctx, s.options.DB, func(q *postgres.Statement) (err error) {
		// A user that waits for a lock must not delay the other users of the group.
		results, err = s.users.CreateMany(ctx, q, newUsers, groupcommit.SlotTimeout)
		return err
	})
	return results, err
}

func (s *Server) createUsers(c echo.Context, body *input.Object) error {
	batch, err := readBatch(c, body)
	if err != nil {
		return err
	}
	newUsers := make([]users.NewUser, len(batch.items))
	err = batch.each(c.Request().Context(), func(i int, item *input.Object) (broken []input.BrokenRule) {
		newUsers[i], broken = readUser(c, item)
		return broken
	})
	if err != nil {
		return err
	}
	return s.change(c, body.Raw(), func(tx *sqlx.Tx) (idempotency.Response, error) {
		results, err := s.createValid(c.Request().Context(), tx, batch, newUsers)
		if err != nil {
			return idempotency.Response{}, err
		}
		return responseOf(http.StatusOK, "", batchResponse[userResult]{Data: results})
	})
}

// createValid creates the valid users of the batch, and returns a result for each
// item. It does not change the batch, because the transaction may be repeated.
func (s *Server) createValid(ctx context.Context, tx *sqlx.Tx, b *batch, newUsers []users.NewUser) ([]userResult, error) {
	var valid []users.NewUser
	var indexes []int
	for i, err := range b.problems {
		if err == nil {
			valid, indexes = append(valid, newUsers[i]), append(indexes, i)
		}
	}
	created, err := s.users.CreateMany(ctx, tx, valid, 0)
	if err != nil {
		return nil, err
	}
	problems := slices.Clone(b.problems)
	results := make([]userResult, len(newUsers))
	for n, index := range indexes {
		if created[n].Err != nil {
			problems[index] = taken(b.items[index])
			continue
		}
		u := wireUser(created[n].User)
		results[index] = userResult{Status: http.StatusCreated, User: &u}
	}
	for i, err := range problems {
		if err != nil {
			p := itemProblem(err)
			results[i] = userResult{Status: p.Status, Problem: p}
		}
	}
	return results, b.whole(problems)
}

// taken returns the problem of an item whose e-mail address belongs to another user.
func taken(item *input.Object) error {
	return &problem.Error{Kind: problem.EmailTaken, Values: []problem.Value{item.Place("email", "is taken")}}
}

// readUser reads a user from the object's members, and returns the rules that the
// members break.
func readUser(c echo.Context, o *input.Object) (users.NewUser, []input.BrokenRule) {
	newUser, err := users.ParseNewUser(o.RequiredString("email"), o.OptionalString("first_name"), o.OptionalString("last_name"))
	newUser.Traceparent = requestOf(c).traceparent
	return newUser, userRules(err)
}

func (s *Server) getUser(c echo.Context) error {
	if strings.Contains(c.Param("id"), "/") { // Echo's last parameter matches slashes, too
		return echo.ErrNotFound
	}
	id, ok := input.ParseUUID(c.Param("id"))
	if !ok { // an invalid id belongs to no user
		return users.ErrNotFound
	}
	var found users.User
	ctx := c.Request().Context()
	err := s.database(ctx, func() (err error) {
		found, err = s.users.Get(ctx, id)
		return err
	})
	if err != nil {
		return err
	}
	return writeJSON(c, http.StatusOK, echo.MIMEApplicationJSON, wireUser(found))
}

func (s *Server) listUsers(c echo.Context) error {
	query, err := input.ReadQuery(c.Request())
	if err != nil {
		return err
	}
	email := query.Text("email")
	params, err := users.ParseListParams(email, query.Integer("limit", users.DefaultLimit), query.Text("cursor"))
	rules := userRules(err)
	for i := range rules {
		if rules[i].Name == "email" && strings.Contains(strings.TrimSpace(email), " ") {
			rules[i].Reason += "; a + in a query means a space, so write %2B"
		}
	}
	if err := query.Check(rules); err != nil {
		return err
	}
	var page users.Page
	ctx := c.Request().Context()
	err = s.database(ctx, func() (err error) {
		page, err = s.users.List(ctx, params)
		return err
	})
	if err != nil {
		return err
	}
	response := userPage{Data: make([]user, len(page.Users))}
	for i, u := range page.Users {
		response.Data[i] = wireUser(u)
	}
	if page.NextCursor != "" {
		response.NextCursor = &page.NextCursor
	}
	return writeJSON(c, http.StatusOK, echo.MIMEApplicationJSON, response)
}

// userRules returns the rules of a *users.ValidationError.
func userRules(err error) (rules []input.BrokenRule) {
	if invalid, ok := errors.AsType[*users.ValidationError](err); ok {
		for _, field := range invalid.Fields {
			rules = append(rules, input.BrokenRule{Name: field.Field, Reason: field.Reason})
		}
	}
	return rules
}
