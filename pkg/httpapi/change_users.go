package httpapi

import (
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	"github.com/labstack/echo/v4"

	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/users"
)

func (s *Server) updateUser(c echo.Context, body *input.Object) error {
	id, err := userID(c)
	if err != nil {
		return err
	}
	change, rules := readChange(c, body)
	if err := body.Check(rules); err != nil {
		return err
	}
	change.ID = id
	if change.If, err = ifMatch(c.Request().Header); err != nil {
		return err
	}
	return s.change(c, body.Raw(), func(tx *sqlx.Tx) (idempotency.Response, error) {
		results, err := s.users.Update(c.Request().Context(), tx, []users.Change{change})
		if err != nil {
			return idempotency.Response{}, err
		}
		if err := results[0].Err; err != nil {
			return idempotency.Response{}, err
		}
		response, err := responseOf(http.StatusOK, "", wireUser(results[0].User))
		response.ETag = etagOf(results[0].User)
		return response, err
	})
}

func (s *Server) deleteUser(c echo.Context) error {
	id, err := userID(c)
	if err != nil {
		return err
	}
	deletion := users.Deletion{ID: id, Traceparent: requestOf(c).traceparent}
	if deletion.If, err = ifMatch(c.Request().Header); err != nil {
		return err
	}
	return s.change(c, nil, func(tx *sqlx.Tx) (idempotency.Response, error) {
		errs, err := s.users.Delete(c.Request().Context(), tx, []users.Deletion{deletion})
		if err != nil {
			return idempotency.Response{}, err
		}
		return idempotency.Response{Status: http.StatusNoContent, Body: []byte{}}, errs[0]
	})
}

func (s *Server) updateUsers(c echo.Context, body *input.Object) error {
	batch, err := readBatch(c, body)
	if err != nil {
		return err
	}
	changes := make([]users.Change, len(batch.items))
	err = batch.each(c.Request().Context(), func(i int, item *input.Object) (rules []input.BrokenRule) {
		id := item.RequiredUUID("id")
		changes[i], rules = readChange(c, item)
		changes[i].ID = id
		return rules
	})
	if err != nil {
		return err
	}
	valid, indexes := validOf(batch, changes)
	return s.change(c, body.Raw(), func(tx *sqlx.Tx) (idempotency.Response, error) {
		updated, err := s.users.Update(c.Request().Context(), tx, valid)
		if err != nil {
			return idempotency.Response{}, err
		}
		results, err := userResults(batch, http.StatusOK, indexes, updated)
		if err != nil {
			return idempotency.Response{}, err
		}
		return responseOf(http.StatusOK, "", batchResponse[userResult]{Data: results})
	})
}

func (s *Server) deleteUsers(c echo.Context, body *input.Object) error {
	batch, err := readBatch(c, body)
	if err != nil {
		return err
	}
	ids := make([]uuid.UUID, len(batch.items))
	err = batch.each(c.Request().Context(), func(i int, item *input.Object) []input.BrokenRule {
		ids[i] = item.RequiredUUID("id")
		return nil
	})
	if err != nil {
		return err
	}
	valid, _ := validOf(batch, ids)
	deletions := make([]users.Deletion, len(valid))
	for i, id := range valid {
		deletions[i] = users.Deletion{ID: id, Traceparent: requestOf(c).traceparent}
	}
	return s.change(c, body.Raw(), func(tx *sqlx.Tx) (idempotency.Response, error) {
		// The deletions have no conditions, so none of them fails alone.
		if _, err := s.users.Delete(c.Request().Context(), tx, deletions); err != nil {
			return idempotency.Response{}, err
		}
		results := slices.Repeat([]userResult{{Status: http.StatusNoContent}}, len(batch.items))
		addProblems(results, batch.problems)
		return responseOf(http.StatusOK, "", batchResponse[userResult]{Data: results})
	})
}

// readChange reads the change of a user from the object's members, and returns the rules
// that the members break.
func readChange(c echo.Context, o *input.Object) (users.Change, []input.BrokenRule) {
	change, err := users.ParseChange(o.MergedString("email", false), o.MergedString("first_name", true), o.MergedString("last_name", true))
	change.Traceparent = requestOf(c).traceparent
	return change, userRules(err)
}

// etagOf returns the entity tag of the user. It differs after each change, because
// UpdatedAt does.
func etagOf(u users.User) string { return `"` + strconv.FormatInt(u.UpdatedAt.UnixMicro(), 10) + `"` }

// entityTags is the form of If-Match in RFC 9110. A list may have empty elements.
var entityTags = regexp.MustCompile(`^[ \t,]*((W/)?"[^\x00-\x20"\x7f]*"[ \t]*(,[ \t,]*|$))+$`)

var entityTag = regexp.MustCompile(`(W/)?"[^"]*"`)

// ifMatch returns the condition in the header If-Match. It returns nil if every version of
// the user matches.
func ifMatch(header http.Header) (func(users.User) bool, error) {
	value := strings.Join(header.Values(headerIfMatch), ",")
	switch {
	case len(header.Values(headerIfMatch)) == 0, strings.TrimSpace(value) == "*":
		return nil, nil //nolint:nilnil // there is no condition
	case !entityTags.MatchString(value):
		return nil, &problem.Error{Kind: problem.MalformedRequest, Detail: `If-Match must be *, or ETags such as "1764403200000000"`}
	}
	tags := entityTag.FindAllString(value, -1) // a weak tag matches no version
	return func(u users.User) bool { return slices.Contains(tags, etagOf(u)) }, nil
}
