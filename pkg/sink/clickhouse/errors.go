package clickhouse

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"syscall"

	chgo "github.com/ClickHouse/clickhouse-go/v2"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// kind describes an error code of ClickHouse and its class.
type kind struct {
	name   string
	class  sink.Class
	reason string
}

// kinds are the codes with a class other than unknown. If the cause would affect every
// batch, the code describes a state of the server, even if its message names a row. A
// code is permanent only if the rows are its only possible cause. Codes of parsing and
// conversion are therefore unknown, because a materialized view or a request that was
// damaged in transit can cause them too. As permanent errors, they would turn the
// complete outbox into dead letters.
//
// https://github.com/ClickHouse/ClickHouse/blob/master/src/Common/ErrorCodes.cpp
var kinds = map[int32]kind{
	// The destination is missing or has the wrong definition.
	16:  {"NO_SUCH_COLUMN_IN_TABLE", sink.Unavailable, "the table lacks a column"},
	60:  {"UNKNOWN_TABLE", sink.Unavailable, "the table is missing"},
	81:  {"UNKNOWN_DATABASE", sink.Unavailable, "the database is missing"},
	218: {"TABLE_IS_DROPPED", sink.Unavailable, "the table is being dropped"},

	// The server refuses access.
	115: {"UNKNOWN_SETTING", sink.Unavailable, "the server does not know a setting that inserts need"},
	164: {"READONLY", sink.Unavailable, "the user or the server is read-only"},
	192: {"UNKNOWN_USER", sink.Unavailable, "the credentials are refused"},
	193: {"WRONG_PASSWORD", sink.Unavailable, "the credentials are refused"},
	194: {"REQUIRED_PASSWORD", sink.Unavailable, "the credentials are refused"},
	452: {"SETTING_CONSTRAINT_VIOLATION", sink.Unavailable, "the user's profile forbids a setting that inserts need"},
	472: {"READONLY_SETTING", sink.Unavailable, "the user's profile forbids a setting that inserts need"},
	497: {"ACCESS_DENIED", sink.Unavailable, "the user lacks a grant"},
	516: {"AUTHENTICATION_FAILED", sink.Unavailable, "the credentials are refused"},

	// The server cannot store anything.
	75:  {"CANNOT_WRITE_TO_FILE_DESCRIPTOR", sink.Unavailable, "the server's disk fails or is full"},
	76:  {"CANNOT_OPEN_FILE", sink.Unavailable, "the server's disk fails or is full"},
	242: {"TABLE_IS_READ_ONLY", sink.Unavailable, "the replica has lost Keeper"},
	243: {"NOT_ENOUGH_SPACE", sink.Unavailable, "the server's disk is full"},
	499: {"S3_ERROR", sink.Unavailable, "the server's object storage fails"},
	774: {"TABLE_IS_PERMANENTLY_READ_ONLY", sink.Unavailable, "the table is on read-only storage"},

	// Replicas, Keeper, and connections between servers.
	203: {"NO_FREE_CONNECTION", sink.Unavailable, "the server cannot reach another server"},
	225: {"NO_ZOOKEEPER", sink.Unavailable, "Keeper is not reachable"},
	254: {"NO_ACTIVE_REPLICAS", sink.Unavailable, "replicas are down"},
	279: {"ALL_CONNECTION_TRIES_FAILED", sink.Unavailable, "the server cannot reach another server"},
	285: {"TOO_FEW_LIVE_REPLICAS", sink.Unavailable, "replicas are down"},
	286: {"UNSATISFIED_QUORUM_FOR_PREVIOUS_WRITE", sink.Unavailable, "replicas lag"},
	289: {"REPLICA_IS_NOT_IN_QUORUM", sink.Unavailable, "replicas lag"},
	319: {"UNKNOWN_STATUS_OF_INSERT", sink.Unavailable, "the connection to Keeper was lost during the commit"},
	999: {"KEEPER_EXCEPTION", sink.Unavailable, "Keeper fails"},

	// The request was cut off, or the server is shutting down.
	32:  {"ATTEMPT_TO_READ_AFTER_EOF", sink.Unknown, "the request was cut off, or a column's expression parses an empty text"},
	33:  {"CANNOT_READ_ALL_DATA", sink.Unknown, "the request was cut off, or a column's expression parses a short text"},
	95:  {"CANNOT_READ_FROM_SOCKET", sink.Unavailable, "the connection broke"},
	96:  {"CANNOT_WRITE_TO_SOCKET", sink.Unavailable, "the connection broke"},
	209: {"SOCKET_TIMEOUT", sink.Unavailable, "the connection is too slow"},
	210: {"NETWORK_ERROR", sink.Unavailable, "the connection broke"},
	236: {"ABORTED", sink.Unavailable, "the server is shutting down"},
	749: {"TCP_CONNECTION_LIMIT_REACHED", sink.Unavailable, "the server accepts no more connections"},
	762: {"HTTP_CONNECTION_LIMIT_REACHED", sink.Unavailable, "the server accepts no more connections"},

	// This code does not mean overload, because larger batches would take even longer.
	159: {"TIMEOUT_EXCEEDED", sink.Unavailable, "the server is too slow for the deadline"},

	// The server is overloaded. Fewer inserts reduce its load.
	173:                 {"CANNOT_ALLOCATE_MEMORY", sink.Overloaded, "the server is short of memory"},
	201:                 {"QUOTA_EXCEEDED", sink.Overloaded, "the user's quota is used up"},
	202:                 {"TOO_MANY_SIMULTANEOUS_QUERIES", sink.Overloaded, "the server runs too many queries"},
	memoryLimitExceeded: {"MEMORY_LIMIT_EXCEEDED", sink.Overloaded, "the server is short of memory"},
	252:                 {"TOO_MANY_PARTS", sink.Overloaded, "merges do not keep up with inserts"},
	439:                 {"CANNOT_SCHEDULE_TASK", sink.Overloaded, "the server is short of threads"},
	745:                 {"SERVER_OVERLOADED", sink.Overloaded, "the server is short of CPU"},
	777:                 {"MEMORY_RESERVATION_KILLED", sink.Overloaded, "the server is short of memory"},
	778:                 {"MEMORY_RESERVATION_FAILED", sink.Overloaded, "the server is short of memory"},

	// The rows violate a rule of the table.
	469: {"VIOLATED_CONSTRAINT", sink.Permanent, "a row violates a CHECK constraint of the table"},
}

const (
	unknownSetting      = 115
	memoryLimitExceeded = 241
)

// ownMemoryLimit matches the message of an error 241 if the statement has exceeded its own
// limit, and not a limit of the user or the server. The wordings are those of versions to
// 24, of version 25.1, and of later versions.
var ownMemoryLimit = regexp.MustCompile(`Memory limit \(for query\) exceeded|\(for query\) memory limit exceeded|Query memory limit exceeded`)

func exceedsOwnMemory(code int32, message string) bool {
	return code == memoryLimitExceeded && ownMemoryLimit.MatchString(message)
}

// serverError is an error of the ClickHouse server. The sink does not return the driver's
// error, because its message may quote rows.
type serverError struct {
	code    int32
	message string
}

// Error implements error.
func (e *serverError) Error() string {
	k, ok := kinds[e.code]
	if !ok {
		return fmt.Sprintf("clickhouse error %d: %s", e.code, e.message)
	}
	if exceedsOwnMemory(e.code, e.message) {
		k.reason = "the statement needs more memory than max_memory_usage"
	}
	return fmt.Sprintf("clickhouse error %d, %s (%s): %s", e.code, k.name, k.reason, e.message)
}

// classify returns the driver's error with its class. It removes data of rows from the
// message. op is the operation that failed.
func (s *Sink) classify(ctx context.Context, op string, err error) error {
	if exception, ok := errors.AsType[*chgo.Exception](err); ok {
		switch exception.Code {
		case unknownSetting, settingConstraintViolation, readonlySetting:
			s.known.Store(nil) // the server or the user's profile has changed
		}
		return &sink.Error{
			Class: kinds[exception.Code].class,
			Err:   fmt.Errorf("%s: %w", op, &serverError{exception.Code, redact(exception)}),
		}
	}
	// If the context ends, the driver closes the connection, and the call can fail with
	// many different errors.
	if cause := context.Cause(ctx); cause != nil {
		class := sink.Unknown // a cancelled context says nothing about the sink
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			class = sink.Unavailable
		}
		return &sink.Error{Class: class, Err: fmt.Errorf("%s: %w", op, cause)}
	}
	class := sink.Unknown
	if isUnreachable(err) {
		class = sink.Unavailable
	}
	return &sink.Error{Class: class, Err: fmt.Errorf("%s: %w", op, withoutURL(err))}
}

// classifyInsert returns the error of an insert with its class. A smaller insert needs less
// memory. The statements of a presence check do not become smaller with the batch.
//
// Limits of the rows and bytes that a statement reads do not apply to an insert, but to
// the queries of materialized views. Their codes are unknown, because such a query can
// also read other tables.
func (s *Sink) classifyInsert(ctx context.Context, op string, err error) error {
	classified := s.classify(ctx, op, err)
	tooLarge := false
	if exception, ok := errors.AsType[*chgo.Exception](err); ok {
		tooLarge = exceedsOwnMemory(exception.Code, exception.Message)
	} else if response, ok := errors.AsType[*chgo.HTTPError](err); ok {
		tooLarge = response.StatusCode == http.StatusRequestEntityTooLarge
	}
	if e, ok := errors.AsType[*sink.Error](classified); ok && tooLarge {
		e.Class = sink.TooLarge
	}
	return classified
}

// isUnreachable returns whether the connection to the server has failed.
func isUnreachable(err error) bool {
	for _, target := range []error{
		io.EOF,
		io.ErrUnexpectedEOF,
		io.ErrClosedPipe, // the body of an HTTP request whose connection is closed
		net.ErrClosed,
		syscall.ECONNRESET,
		syscall.EPIPE,
		context.DeadlineExceeded, // the driver's dial has timed out
		chgo.ErrAcquireConnTimeout,
		chgo.ErrConnectionClosed,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	if _, ok := errors.AsType[*url.Error](err); ok {
		return true
	}
	if _, ok := errors.AsType[foreignResponseError](err); ok {
		return true
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return true
	}
	// An HTTP status without a code of ClickHouse comes from a proxy. 413 is not
	// included, because another batch may be smaller. 411, 414 and 431 are included,
	// because every insert has no length, and has the same URL and headers.
	if e, ok := errors.AsType[*chgo.HTTPError](err); ok {
		switch e.StatusCode {
		case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusProxyAuthRequired,
			http.StatusRequestTimeout, http.StatusTooManyRequests,
			http.StatusLengthRequired, http.StatusRequestURITooLong, http.StatusRequestHeaderFieldsTooLarge,
			http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusInsufficientStorage:
			return true
		}
	}
	return false
}

const maxMessageBytes = 500

var (
	// The message of a violated constraint ends with the values of the row.
	columnValues = regexp.MustCompile(`(?s)\.? Column values: .*`)
	// Errors of functions quote their arguments.
	quoted = regexp.MustCompile(`'(?:[^'\\]|\\.)*'?`)
)

// redact returns the message of an exception without data of rows. Messages about a state
// of the server name tables and users, but no data.
func redact(exception *chgo.Exception) string {
	message := columnValues.ReplaceAllString(exception.Message, "")
	if kinds[exception.Code].class == sink.Unknown {
		message = quoted.ReplaceAllString(message, "'…'")
	}
	if len(message) > maxMessageBytes {
		message = strings.ToValidUTF8(message[:maxMessageBytes], "") + "…"
	}
	return message
}
