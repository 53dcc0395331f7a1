package users

import (
	"errors"
	"fmt"
	"net/mail"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

const (
	// MaxEmailBytes is the longest address that SMTP can deliver to (RFC 5321,
	// section 4.5.3.1.3, less the path's brackets).
	MaxEmailBytes = 254
	// MaxNameLength bounds FirstName and LastName, in Unicode code points.
	MaxNameLength = 100

	maxLocalPartBytes   = 64 // RFC 5321, section 4.5.3.1.1
	maxDomainLabelBytes = 63 // RFC 1035, section 2.3.4
)

// ValidationError says which of the values that a caller gave break a rule:
// all of them. Nothing has been read or written.
type ValidationError struct {
	Fields []FieldError
}

// FieldError is one broken rule.
type FieldError struct {
	// Field is the value's name: email, first_name, last_name, limit, cursor.
	Field string
	// Reason completes a sentence that begins with the field's name. It never
	// repeats the value.
	Reason string
}

// Error implements error. It names the fields and not their values.
func (e *ValidationError) Error() string {
	reasons := make([]string, len(e.Fields))
	for i, f := range e.Fields {
		reasons[i] = f.Field + " " + f.Reason
	}
	return strings.Join(reasons, "; ")
}

// validation collects what breaks a rule.
type validation struct {
	broken []FieldError
}

func (v *validation) check(field string, err error) {
	if err != nil {
		v.broken = append(v.broken, FieldError{Field: field, Reason: err.Error()})
	}
}

func (v *validation) err() error {
	if len(v.broken) == 0 {
		return nil
	}
	return &ValidationError{Fields: v.broken}
}

// normalizeEmail returns the address as it is stored: trimmed, the domain in
// lower case. It takes what is a plain address on the Internet and nothing
// that an address may be besides in a message's header: no display name, no
// comment, no quoted local part, no address literal.
func normalizeEmail(input string) (string, error) {
	email := strings.TrimSpace(input)
	switch {
	case email == "":
		return "", errors.New("must not be empty")
	case len(email) > MaxEmailBytes:
		return "", fmt.Errorf("must not be longer than %d bytes", MaxEmailBytes)
	case !isASCII(email):
		return "", errors.New("must be in ASCII: write an international domain in its xn-- form")
	}
	address, err := mail.ParseAddress(email)
	if err != nil || address.Address != email {
		return "", errors.New("must be a bare address such as ada@example.com")
	}
	at := strings.LastIndexByte(email, '@')
	local, domain := email[:at], strings.ToLower(email[at+1:])
	if len(local) > maxLocalPartBytes {
		return "", fmt.Errorf("must not have more than %d bytes before the @", maxLocalPartBytes)
	}
	if !isHostname(domain) {
		return "", errors.New("must have a domain name such as example.com after the @")
	}
	return local + "@" + domain, nil
}

// emailKey is what makes an address unique: lower(email) under collation C.
func emailKey(normalized string) string { return strings.ToLower(normalized) }

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// isHostname reports whether the lower-case domain is a host's name with at
// least two labels. A last label of digits alone would be an IPv4 address
// (RFC 3696, section 2).
func isHostname(domain string) bool {
	labels := strings.Split(domain, ".")
	for _, label := range labels {
		if label == "" || len(label) > maxDomainLabelBytes ||
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" ||
			label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
	}
	return len(labels) >= 2 && strings.Trim(labels[len(labels)-1], "0123456789") != ""
}

// normalizeName returns the name as it is stored: trimmed, in normal form C,
// so that one name has one spelling in bytes.
func normalizeName(input string) (string, error) {
	if !utf8.ValidString(input) {
		return "", errors.New("must be valid UTF-8")
	}
	name := norm.NFC.String(strings.TrimSpace(input))
	switch {
	case strings.ContainsFunc(name, unicode.IsControl): // NUL, which text cannot hold, among them
		return "", errors.New("must not contain control characters")
	case utf8.RuneCountInString(name) > MaxNameLength:
		return "", fmt.Errorf("must not be longer than %d characters", MaxNameLength)
	}
	return name, nil
}
