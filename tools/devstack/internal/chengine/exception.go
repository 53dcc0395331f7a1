package chengine

import (
	"fmt"
	"regexp"
	"strconv"

	"github.com/ClickHouse/ch-go/proto"
)

// Exception is ClickHouse's own kind of error.
type Exception struct { //nolint:errname // as ClickHouse and its drivers call it
	// Code is one of ClickHouse's error codes.
	Code proto.Error
	// Name is the code's symbol, such as UNKNOWN_TABLE.
	Name string
	// Message says what happened, without code and name.
	Message string
}

// Error gives the exception in the form in which ClickHouse prints it.
func (e *Exception) Error() string {
	return fmt.Sprintf("Code: %d. DB::Exception: %s (%s)", e.Code, e.Message, e.Name)
}

// exceptionText matches what libchdb reports. The last pair of parentheses in
// capitals is the name of the code; a version may follow.
var exceptionText = regexp.MustCompile(`(?s)^(?:Error: )?Code: (\d+)\. DB::\w*Exception: (.*) \(([A-Z0-9_]+)\)(?: \(version [^)]*\))?\s*$`)

// newException reads the text of an error that libchdb reported.
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
