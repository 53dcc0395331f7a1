package postgres

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"net"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// IsUnavailable reports whether err is about the server's state, or the way to
// it, and not about what was asked: the same may succeed later.
func IsUnavailable(err error) bool {
	switch {
	case err == nil, errors.Is(err, context.Canceled):
		return false
	case errors.Is(err, driver.ErrBadConn), errors.Is(err, sql.ErrConnDone),
		errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed):
		return true
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	server, ok := errors.AsType[*pq.Error](err)
	if !ok {
		return false
	}
	switch server.Code {
	case "25006", // read_only_sql_transaction: a standby, or set to read-only
		"57014", // query_canceled: by a timeout or an operator; lib/pq shows an expired context as this, too
		"57P01", // admin_shutdown
		"57P02", // crash_shutdown
		"57P03", // cannot_connect_now: starting, stopping, recovering
		"57P05", // idle_session_timeout
		"58030": // io_error
		return true
	}
	c := class(server)
	return c == connectionException || c == insufficientResources
}

// Classes of SQLSTATE codes, see
// https://www.postgresql.org/docs/current/errcodes-appendix.html.
const (
	connectionException   = "08" // poolers use it for their own errors, too
	insufficientResources = "53" // connections, memory, disk
)

func class(err *pq.Error) string {
	if len(err.Code) != 5 {
		return ""
	}
	return string(err.Code[:2])
}

// IsUniqueViolation reports whether err says that the unique constraint or
// index of that name refused a row.
func IsUniqueViolation(err error, constraint string) bool {
	server, ok := errors.AsType[*pq.Error](err)
	return ok && server.Code == pqerror.UniqueViolation && server.Constraint == constraint
}
