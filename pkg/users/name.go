package users

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

// MaxNameLength is the maximum length of a Name in Unicode code points.
const MaxNameLength = 100

// Name is a first or last name. Every value is valid. The zero value is the empty name.
// Values can be compared with ==.
type Name struct {
	text string
}

// ParseName parses a name. It trims white space and converts the name to Unicode normal
// form C, so that equal names have equal bytes. The text must be UTF-8 without control
// characters, and the name at most MaxNameLength long. The error completes a sentence
// that begins with the name of the value.
func ParseName(text string) (Name, error) {
	if !utf8.ValidString(text) {
		return Name{}, errors.New("must be valid UTF-8")
	}
	name := norm.NFC.String(strings.TrimSpace(text))
	switch {
	case strings.ContainsFunc(name, unicode.IsControl): // includes NUL, which PostgreSQL's text cannot store
		return Name{}, errors.New("must not contain control characters")
	case utf8.RuneCountInString(name) > MaxNameLength:
		return Name{}, fmt.Errorf("must not be longer than %d characters", MaxNameLength)
	}
	return Name{text: name}, nil
}

// String returns the name.
func (n Name) String() string { return n.text }
