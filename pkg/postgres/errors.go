package postgres

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"net"
	"slices"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
)

// IsUnavailable reports whether the server or the connection caused err. The same
// statement can succeed later. It returns false for errors in the statement and for
// context.Canceled.
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
	case "25006", // read_only_sql_transaction: a standby or a read-only server
		"57014", // query_canceled: a timeout, an operator, or, in lib/pq, an expired context
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
	connectionException   = "08" // poolers also use it for their own errors
	insufficientResources = "53" // connections, memory, disk
	invalidAuthorization  = "28" // an unknown role, or wrong credentials
)

func class(err *pq.Error) string {
	if len(err.Code) != 5 {
		return ""
	}
	return string(err.Code[:2])
}

// ErrConflict means that another transaction committed what this transaction was about to
// commit. The caller has to roll back.
var ErrConflict = errors.New("conflict with another transaction")

// IsConflict reports whether the transaction failed because of another transaction: a
// deadlock, a serialization failure or ErrConflict. The same transaction can succeed at
// once.
func IsConflict(err error) bool {
	return errors.Is(err, ErrConflict) || hasCode(err, pqerror.TRSerializationFailure, pqerror.TRDeadlockDetected)
}

// IsLockTimeout reports whether a lock was not available within lock_timeout.
func IsLockTimeout(err error) bool { return hasCode(err, pqerror.LockNotAvailable) }

// IsAccessRefused reports whether the server has refused the role or its credentials, for
// example because the password was changed.
func IsAccessRefused(err error) bool {
	server, ok := errors.AsType[*pq.Error](err)
	return ok && class(server) == invalidAuthorization
}

func hasCode(err error, codes ...pqerror.Code) bool {
	server, ok := errors.AsType[*pq.Error](err)
	return ok && slices.Contains(codes, server.Code)
}

// IsUniqueViolation reports whether err is a violation of the unique constraint or
// index with this name.
func IsUniqueViolation(err error, constraint string) bool {
	server, ok := errors.AsType[*pq.Error](err)
	return ok && server.Code == pqerror.UniqueViolation && server.Constraint == constraint
}
