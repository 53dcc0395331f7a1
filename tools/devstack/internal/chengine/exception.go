package chengine

import (
	"fmt"
	"regexp"
	"strconv"

	"github.com/ClickHouse/ch-go/proto"
)

// Exception is a ClickHouse error.
type Exception struct { //nolint:errname // the name that ClickHouse and its drivers use
	// Code is one of ClickHouse's error codes.
	Code proto.Error
	// Name is the code's symbol, such as UNKNOWN_TABLE.
	Name string
	// Message is the text without code and name.
	Message string
}

// Error returns the exception in the form that ClickHouse prints.
func (e *Exception) Error() string {
	return fmt.Sprintf("Code: %d. DB::Exception: %s (%s)", e.Code, e.Message, e.Name)
}

// exceptionText matches the errors of libchdb. The last pair of parentheses
// with capital letters holds the name of the code; a version may follow.
var exceptionText = regexp.MustCompile(`(?s)^(?:Error: )?Code: (\d+)\. DB::\w*Exception: (.*) \(([A-Z0-9_]+)\)(?: \(version [^)]*\))?\s*$`)

// newException parses the text of a libchdb error.
func newException(text string) *Exception {
	match := exceptionText.FindStringSubmatch(text)
	if match == nil {
		return &Exception{Code: proto.ErrUnknownException, Name: "UNKNOWN_EXCEPTION", Message: text}
	}
	code, err := strconv.ParseInt(match[1], 10, 32)
	if err != nil {
		return &Exception{Code: proto.ErrUnknownException, Name: "UNKNOWN_EXCEPTION", Message: text}
	}
	return &Exception{Code: proto.Error(code), Name: match[3], Message: match[2]}
}
