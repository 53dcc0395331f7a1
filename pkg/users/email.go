package users

import (
	"errors"
	"fmt"
	"net/mail"
	"strings"
	"unicode/utf8"
)

const (
	// MaxEmailBytes is the maximum length of an address in SMTP: RFC 5321, section
	// 4.5.3.1.3, without the brackets of the path.
	MaxEmailBytes = 254

	maxLocalPartBytes   = 64 // RFC 5321, section 4.5.3.1.1
	maxDomainLabelBytes = 63 // RFC 1035, section 2.3.4
)

// Email is an e-mail address. All values except the zero value are valid. == is
// case-sensitive.
type Email struct {
	address string
}

// ParseEmail parses an address. It trims white space and lower-cases the domain. The
// address must be ASCII and at most MaxEmailBytes long. ParseEmail refuses display
// names, comments, quoted local parts and address literals. The error completes a
// sentence that begins with the name of the value.
func ParseEmail(text string) (Email, error) {
	email := strings.TrimSpace(text)
	switch {
	case email == "":
		return Email{}, errors.New("must not be empty")
	case len(email) > MaxEmailBytes:
		return Email{}, fmt.Errorf("must not be longer than %d bytes", MaxEmailBytes)
	case !isASCII(email):
		return Email{}, errors.New("must be in ASCII: write an international domain in its xn-- form")
	}
	address, err := mail.ParseAddress(email)
	if err != nil || address.Address != email {
		return Email{}, errors.New("must be a bare address such as ada@example.com")
	}
	at := strings.LastIndexByte(email, '@')
	local, domain := email[:at], strings.ToLower(email[at+1:])
	if len(local) > maxLocalPartBytes {
		return Email{}, fmt.Errorf("must not have more than %d bytes before the @", maxLocalPartBytes)
	}
	if !isHostname(domain) {
		return Email{}, errors.New("must have a domain name such as example.com after the @")
	}
	return Email{address: local + "@" + domain}, nil
}

// String returns the address, or an empty string for the zero value.
func (e Email) String() string { return e.address }

// IsZero reports whether e is the zero value.
func (e Email) IsZero() bool { return e == Email{} }

// key returns the key of the index users_email_key: lower(email) under collation C.
func (e Email) key() string { return strings.ToLower(e.address) }

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// isHostname reports whether the lower-case domain is a host name with at least two
// labels. The last label must not be all digits, as in an IPv4 address (RFC 3696,
// section 2).
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
