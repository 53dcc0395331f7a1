package chserver

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// newException returns an error of this server in ClickHouse's form.
func newException(code proto.Error, name, format string, args ...any) *chengine.Exception {
	return &chengine.Exception{Code: code, Name: name, Message: fmt.Sprintf(format, args...)}
}

// asException converts any error to one with a ClickHouse code.
func asException(err error) *chengine.Exception {
	if exception, ok := errors.AsType[*chengine.Exception](err); ok {
		return exception
	}
	return newException(proto.ErrStdException, "STD_EXCEPTION", "%v", err)
}

// httpStatus returns the status that ClickHouse's HTTP interface sends for an
// exception code (src/Server/HTTP/exceptionCodeToHTTPStatus.cpp).
func httpStatus(code proto.Error) int {
	switch code {
	case proto.ErrRequiredPassword:
		return http.StatusUnauthorized
	case proto.ErrUnknownUser, proto.ErrWrongPassword, proto.ErrAuthenticationFailed, proto.ErrSetNonGrantedRole:
		return http.StatusForbidden
	case proto.ErrCannotParseText,
		proto.ErrCannotParseEscapeSequence,
		proto.ErrCannotParseQuotedString,
		proto.ErrCannotParseDate,
		proto.ErrCannotParseDatetime,
		proto.ErrCannotParseNumber,
		proto.ErrCannotParseInputAssertionFailed,
		proto.ErrUnknownElementInAst,
		proto.ErrUnknownTypeOfAstNode,
		proto.ErrTooDeepAst,
		proto.ErrTooBigAst,
		proto.ErrUnexpectedAstStructure,
		proto.ErrSyntaxError,
		proto.ErrIncorrectData,
		proto.ErrTypeMismatch:
		return http.StatusBadRequest
	case proto.ErrUnknownTable,
		proto.ErrUnknownFunction,
		proto.ErrUnknownIdentifier,
		proto.ErrUnknownType,
		proto.ErrUnknownStorage,
		proto.ErrUnknownDatabase,
		proto.ErrUnknownSetting,
		proto.ErrUnknownDirectionOfSorting,
		proto.ErrUnknownAggregateFunction,
		proto.ErrUnknownFormat,
		proto.ErrUnknownDatabaseEngine,
		proto.ErrUnknownTypeOfQuery:
		return http.StatusNotFound
	case proto.ErrTimeoutExceeded:
		return http.StatusRequestTimeout
	case proto.ErrQueryIsTooLarge:
		return http.StatusRequestEntityTooLarge
	case proto.ErrNotImplemented:
		return http.StatusNotImplemented
	case proto.ErrSocketTimeout, proto.ErrCannotScheduleTask:
		return http.StatusServiceUnavailable
	default:
		return http.StatusInternalServerError
	}
}
