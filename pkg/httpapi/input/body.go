package input

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"os"
	"slices"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

const (
	// MaxDepth limits how deeply arrays and objects may be nested in a body. Deeper
	// nesting can exhaust the stack of PostgreSQL or of a consumer.
	MaxDepth = 500
	// MaxNames limits the names of an object and of the objects that contain it. The check
	// for duplicate names keeps these names in memory.
	MaxNames = 100_000
	// MaxFields limits the fields of a body or of an item. The API has fewer fields.
	MaxFields = 64
)

// Media types of JSON bodies.
const (
	JSON       = "application/json"
	MergePatch = "application/merge-patch+json" // RFC 7396
)

// ReadBody reads the request's body, of at most maxBytes and of one of the media types. The
// error is a *problem.Error.
func ReadBody(w http.ResponseWriter, r *http.Request, maxBytes int64, mediaTypes ...string) ([]byte, error) {
	if err := checkMediaType(r.Header, mediaTypes); err != nil {
		return nil, err
	}
	return readBody(w, r, maxBytes)
}

// ParseObject parses a body. The body must be one JSON object in valid I-JSON (RFC 7493):
// UTF-8, no lone surrogates, no duplicate names in an object. encoding/json would replace
// invalid text and keep the last duplicate. The error is a *problem.Error, or the cause of
// ctx.
func ParseObject(ctx context.Context, body []byte) (*Object, error) {
	if err := checkNesting(body); err != nil {
		return nil, err
	}
	members, err := membersOf(ctx, body)
	if e, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		return nil, invalidJSON(short(e.JSONPointer), describe(body, e))
	}
	if shape, ok := errors.AsType[*shapeError](err); ok {
		return nil, problem.Invalid(problem.InBody("", shape.detail))
	}
	if err != nil {
		return nil, err
	}
	return newObject("", body, members), nil
}

func checkMediaType(header http.Header, mediaTypes []string) error {
	mediaType, params, err := mime.ParseMediaType(header.Get("Content-Type"))
	charset := cmp.Or(params["charset"], "utf-8")
	encoding := cmp.Or(header.Get("Content-Encoding"), "identity")
	if err != nil || !slices.Contains(mediaTypes, mediaType) ||
		!strings.EqualFold(charset, "utf-8") || !strings.EqualFold(encoding, "identity") {
		return &problem.Error{
			Kind:   problem.UnsupportedMediaType,
			Detail: "The body must be sent as Content-Type: " + strings.Join(mediaTypes, " or ") + ", in UTF-8 and without a Content-Encoding",
		}
	}
	return nil
}

func readBody(w http.ResponseWriter, r *http.Request, maxBytes int64) ([]byte, error) {
	tooLarge := &problem.Error{
		Kind:   problem.BodyTooLarge,
		Detail: fmt.Sprintf("The request's body is larger than %d bytes", maxBytes),
	}
	if r.ContentLength > maxBytes {
		return nil, tooLarge
	}
	// MaxBytesReader closes the connection if a body without a Content-Length is larger
	// than maxBytes.
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBytes))
	if err == nil {
		return body, nil
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return nil, tooLarge
	}
	if p, ok := errors.AsType[*problem.Error](err); ok {
		return nil, p
	}
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(r.Context().Err(), context.DeadlineExceeded) {
		return nil, &problem.Error{Kind: problem.RequestTimeout}
	}
	return nil, &problem.Error{Kind: problem.MalformedRequest, Detail: "The request's body ended early, or its framing is invalid"}
}

// checkNesting returns a problem if the JSON is nested deeper than MaxDepth, or has more
// than MaxNames names in an object and the objects that contain it.
func checkNesting(body []byte) error {
	names := make([]int, 1, MaxDepth+1) // of each open array or object
	open, inString, escaped := 0, false, false
	for _, b := range body {
		switch {
		case escaped:
			escaped = false
		case inString:
			escaped, inString = b == '\\', b != '"'
		case b == '"':
			inString = true
		case b == ':':
			names[len(names)-1]++
			open++
			if open > MaxNames {
				return invalidJSON("", fmt.Sprintf("has more than %d names in an object and the objects that contain it", MaxNames))
			}
		case b == '[' || b == '{':
			if len(names) > MaxDepth {
				return invalidJSON("", fmt.Sprintf("is nested deeper than %d levels", MaxDepth))
			}
			names = append(names, 0)
		case (b == ']' || b == '}') && len(names) > 1:
			open -= names[len(names)-1]
			names = names[:len(names)-1]
		}
	}
	return nil
}

func invalidJSON(pointer, detail string) *problem.Error {
	return &problem.Error{Kind: problem.InvalidJSON, Values: []problem.Value{problem.InBody(pointer, detail)}}
}

// describe returns the detail of a syntax error.
func describe(body []byte, e *jsontext.SyntacticError) string {
	switch {
	case len(bytes.TrimSpace(body)) == 0:
		return "the body is empty"
	case errors.Is(e, jsontext.ErrDuplicateName):
		return "is a duplicate name"
	case errors.Is(e, io.ErrUnexpectedEOF):
		return "the body ends within a value"
	}
	return fmt.Sprintf("%s, at or after byte %d", strings.TrimPrefix(e.Err.Error(), "jsontext: "), e.ByteOffset)
}
