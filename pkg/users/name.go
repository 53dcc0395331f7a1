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
// characters, and the name at most MaxNameLength long. Format characters are invisible and
// count as control characters. Some of them reverse the direction of the text. Only U+200C
// and U+200D are allowed, and only between letters, because Persian and Indic names need
// them. The error completes a sentence that begins with the name of the value.
func ParseName(text string) (Name, error) {
	if !utf8.ValidString(text) {
		return Name{}, errors.New("must be valid UTF-8")
	}
	name := norm.NFC.String(strings.TrimSpace(text))
	switch {
	case hasControls(name):
		return Name{}, errors.New("must not contain control characters")
	case utf8.RuneCountInString(name) > MaxNameLength:
		return Name{}, fmt.Errorf("must not be longer than %d characters", MaxNameLength)
	}
	return Name{text: name}, nil
}

// hasControls reports whether the name has control characters. They include NUL, which
// PostgreSQL's text cannot store.
func hasControls(name string) bool {
	runes := []rune(name)
	isLetter := func(i int) bool {
		return i >= 0 && i < len(runes) && (unicode.IsLetter(runes[i]) || unicode.IsMark(runes[i]))
	}
	for i, r := range runes {
		joins := (r == '\u200c' || r == '\u200d') && isLetter(i-1) && isLetter(i+1)
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) && !joins {
			return true
		}
	}
	return false
}

// String returns the name.
func (n Name) String() string { return n.text }
