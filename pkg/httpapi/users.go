package httpapi

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
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
	ctx := c.Request().Context()
	refused := false // whether PostgreSQL has refused the group
	err := s.changeInGroup(c, body.Raw(), func(key *idempotency.Key) (idempotency.Response, error) {
		if key != nil && s.reusers.has(key.Client) {
			return idempotency.Response{}, groupcommit.ErrCommitAlone
		}
		result, err := s.creations.Do(ctx, creation{newUser, key})
		refused = key != nil && errors.Is(err, groupcommit.ErrCommitAlone)
		if err := cmp.Or(err, result.Err); err != nil {
			return idempotency.Response{}, err //nolint:wrapcheck // an error of users or groupcommit
		}
		return responseToCreate(result.User)
	}, func(tx *sqlx.Tx) (idempotency.Response, error) {
		created, err := s.users.Create(ctx, tx, newUser)
		if err != nil {
			return idempotency.Response{}, err
		}
		return responseToCreate(created)
	})
	if refused && (errors.Is(err, idempotency.ErrMismatch) || c.Response().Header().Get(headerIdempotencyReplayed) != "") {
		s.reusers.add(clientOf(c))
	}
	return err
}

// reuseTime is how long the requests of a client that has reused a key commit alone.
const reuseTime = 10 * time.Second

// reusers are the clients that have sent a key again with another address. Such a request
// makes its whole group fail, so a client must not be able to repeat that quickly.
type reusers struct {
	mu    sync.Mutex
	until map[string]time.Time // by client; there are only as many as in Options.Keys
}

func (r *reusers) add(client string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.until[client] = time.Now().Add(reuseTime)
}

func (r *reusers) has(client string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Before(r.until[client])
}

func responseToCreate(created users.User) (idempotency.Response, error) {
	response, err := responseOf(http.StatusCreated, "/v1/users/"+created.ID.String(), wireUser(created))
	response.ETag = etagOf(created)
	return response, err
}

// creation is the request for a new user. key is nil if the request has no idempotency key.
type creation struct {
	users.NewUser

	key *idempotency.Key
}

func (c creation) keyInGroup() string {
	if c.key == nil {
		return ""
	}
	return c.key.Client + " " + c.key.Value
}

// createGroup creates the users of independent requests in one transaction, and stores the
// responses to requests with idempotency keys. A request with a key gets ErrCommitAlone if
// no user was created: it may be the repetition of an earlier request.
func (s *Server) createGroup(ctx context.Context, creations []creation) (results []users.Result, err error) {
	newUsers := make([]users.NewUser, len(creations))
	// A user that waits for a lock must not delay the other users of the group.
	options := users.ManyOptions{LockTimeout: groupcommit.SlotTimeout}
	for i, c := range creations {
		newUsers[i] = c.NewUser
		if c.key != nil {
			options.Companion = func(created []users.User, firstParameter int) (postgres.Companion, error) {
				return s.keepResponses(creations, created, firstParameter)
			}
		}
	}
	err = postgres.InStatement(ctx, s.options.DB, func(q *postgres.Statement) (err error) {
		results, err = s.users.CreateMany(ctx, q, newUsers, options)
		return err
	})
	for i := range results {
		if creations[i].key != nil && results[i].Err != nil {
			results[i].Err = groupcommit.ErrCommitAlone
		}
	}
	return results, err
}

// keepResponses returns the SQL that stores the responses to the requests with idempotency
// keys.
func (s *Server) keepResponses(creations []creation, created []users.User, firstParameter int) (postgres.Companion, error) {
	var responses []idempotency.RowResponse
	for i, c := range creations {
		if c.key == nil {
			continue
		}
		response, err := responseToCreate(created[i])
		if err != nil {
			return postgres.Companion{}, err
		}
		responses = append(responses, idempotency.RowResponse{RowID: created[i].ID, Key: *c.key, Response: response})
	}
	return s.options.Idempotency.ForRows(responses, firstParameter), nil
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
	valid, indexes := validOf(b, newUsers)
	created, err := s.users.CreateMany(ctx, tx, valid, users.ManyOptions{})
	if err != nil {
		return nil, err
	}
	return userResults(b, http.StatusCreated, indexes, created)
}

// userResults returns a result for each item of the batch. status is the status of a
// success. The results of the users are those of the items with the indexes.
func userResults(b *batch, status int, indexes []int, done []users.Result) ([]userResult, error) {
	problems := slices.Clone(b.problems)
	results := make([]userResult, len(b.items))
	for n, index := range indexes {
		switch err := done[n].Err; {
		case errors.Is(err, users.ErrEmailTaken):
			problems[index] = taken(b.items[index])
		case errors.Is(err, users.ErrNotFound):
			problems[index] = unknownID(b.items[index])
		case err != nil:
			return nil, err
		default:
			u := wireUser(done[n].User)
			results[index] = userResult{Status: status, User: &u}
		}
	}
	addProblems(results, problems)
	return results, b.whole(problems)
}

// addProblems replaces the results of the items that have problems.
func addProblems(results []userResult, problems []error) {
	for i, err := range problems {
		if err != nil {
			p := itemProblem(err)
			results[i] = userResult{Status: p.Status, Problem: p}
		}
	}
}

// taken returns the problem of an item whose e-mail address belongs to another user.
func taken(item *input.Object) error {
	return &problem.Error{Kind: problem.EmailTaken, Values: []problem.Value{item.Place("email", "is taken")}}
}

// unknownID returns the problem of an item whose id belongs to no user.
func unknownID(item *input.Object) error {
	return &problem.Error{Kind: problem.UserNotFound, Values: []problem.Value{item.Place("id", "belongs to no user")}}
}

// readUser reads a user from the object's members, and returns the rules that the
// members break.
func readUser(c echo.Context, o *input.Object) (users.NewUser, []input.BrokenRule) {
	newUser, err := users.ParseNewUser(o.RequiredString("email"), o.OptionalString("first_name"), o.OptionalString("last_name"))
	newUser.Traceparent = requestOf(c).traceparent
	return newUser, userRules(err)
}

var batchMethods = map[string]string{"batch": "OPTIONS, PATCH, POST", "batch/delete": "OPTIONS, POST"}

// userID returns the id in the path.
func userID(c echo.Context) (uuid.UUID, error) {
	// Echo's last parameter also matches the other paths below /v1/users, for the methods
	// that these paths do not have.
	if allowed, ok := batchMethods[c.Param("id")]; ok {
		c.Response().Header().Set(echo.HeaderAllow, allowed)
		return uuid.Nil, echo.ErrMethodNotAllowed
	}
	if strings.Contains(c.Param("id"), "/") {
		return uuid.Nil, echo.ErrNotFound
	}
	id, ok := input.ParseUUID(c.Param("id"))
	if !ok { // an invalid id belongs to no user
		return uuid.Nil, users.ErrNotFound
	}
	return id, nil
}

func (s *Server) getUser(c echo.Context) error {
	id, err := userID(c)
	if err != nil {
		return err
	}
	var found users.User
	ctx := c.Request().Context()
	err = s.database(ctx, func() (err error) {
		found, err = s.users.Get(ctx, id)
		return err
	})
	if err != nil {
		return err
	}
	c.Response().Header().Set(headerETag, etagOf(found))
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
