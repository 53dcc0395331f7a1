package outbox

import (
	"encoding/json"
	"errors"
	"unicode/utf8"
)

// JSON is the text of one JSON value. It is always valid, except for the zero value. The
// zero value is empty and cannot be published.
type JSON struct{ text string }

var (
	errNotUTF8 = errors.New("is not valid UTF-8")
	errNotJSON = errors.New("is not valid JSON")
)

// ParseJSON returns the text as JSON, byte for byte. It returns an error if the text is
// not exactly one JSON value in UTF-8.
func ParseJSON(text []byte) (JSON, error) {
	switch {
	case !utf8.Valid(text):
		return JSON{}, errNotUTF8
	case !json.Valid(text):
		return JSON{}, errNotJSON
	}
	return JSON{text: string(text)}, nil
}

// String returns the text.
func (j JSON) String() string { return j.text }

// Len returns the length of the text in bytes.
func (j JSON) Len() int { return len(j.text) }

// MarshalJSON implements json.Marshaler. The zero value is null.
func (j JSON) MarshalJSON() ([]byte, error) {
	if j.text == "" {
		return []byte("null"), nil
	}
	return []byte(j.text), nil
}
