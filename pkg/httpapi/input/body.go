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
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

// MaxDepth limits how deeply arrays and objects may be nested in a body. Deeper
// nesting can exhaust the stack of PostgreSQL or of a consumer.
const MaxDepth = 500

// ReadObject reads the request's body, of at most maxBytes. The body must be one
// JSON object in valid I-JSON (RFC 7493): UTF-8, no lone surrogates, no duplicate
// names in an object. encoding/json would replace invalid text and keep the last
// duplicate. The error is a *problem.Error.
func ReadObject(w http.ResponseWriter, r *http.Request, maxBytes int64) (*Object, error) {
	if err := checkMediaType(r.Header); err != nil {
		return nil, err
	}
	body, err := readBody(w, r, maxBytes)
	if err != nil {
		return nil, err
	}
	if isTooDeep(body) {
		return nil, invalidJSON("", fmt.Sprintf("is nested deeper than %d levels", MaxDepth))
	}
	var members map[string]jsontext.Value
	err = json.Unmarshal(body, &members)
	if _, ok := errors.AsType[*json.SemanticError](err); ok { // not an object; Unmarshal did not read the rest
		err = json.Unmarshal(body, new(jsontext.Value))
	}
	if e, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		return nil, invalidJSON(string(e.JSONPointer), describe(body, e))
	}
	if err != nil || members == nil {
		return nil, problem.Invalid(notAnObject(""))
	}
	return newObject("", body, members), nil
}

func checkMediaType(header http.Header) error {
	mediaType, params, err := mime.ParseMediaType(header.Get("Content-Type"))
	charset := cmp.Or(params["charset"], "utf-8")
	encoding := cmp.Or(header.Get("Content-Encoding"), "identity")
	if err != nil || mediaType != "application/json" ||
		!strings.EqualFold(charset, "utf-8") || !strings.EqualFold(encoding, "identity") {
		return &problem.Error{Kind: problem.UnsupportedMediaType}
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
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(r.Context().Err(), context.DeadlineExceeded) {
		return nil, &problem.Error{Kind: problem.RequestTimeout}
	}
	return nil, &problem.Error{Kind: problem.MalformedRequest, Detail: "The request's body ended early, or its framing is invalid"}
}

// isTooDeep reports whether the JSON is nested deeper than MaxDepth.
func isTooDeep(body []byte) bool {
	depth, inString, escaped := 0, false, false
	for _, b := range body {
		switch {
		case escaped:
			escaped = false
		case inString:
			escaped, inString = b == '\\', b != '"'
		case b == '"':
			inString = true
		case b == '[' || b == '{':
			depth++
			if depth > MaxDepth {
				return true
			}
		case b == ']' || b == '}':
			depth--
		}
	}
	return false
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
