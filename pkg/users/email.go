package users

import (
	"errors"
	"fmt"
	"net/mail"
	"strings"
	"unicode/utf8"
)

const (
	// MaxEmailBytes is the longest address that SMTP can deliver to (RFC 5321,
	// section 4.5.3.1.3, less the path's brackets).
	MaxEmailBytes = 254

	maxLocalPartBytes   = 64 // RFC 5321, section 4.5.3.1.1
	maxDomainLabelBytes = 63 // RFC 1035, section 2.3.4
)

// Email is an e-mail address. The zero value is no address; every other value is
// valid. Values can be compared with ==, which respects case.
type Email struct {
	address string
}

// ParseEmail returns the address that the text has, without the space around it
// and with the domain in lower case. It accepts plain addresses on the Internet:
// ASCII, at most MaxEmailBytes, without the display name, comment, quoted local
// part or address literal that an address in a message's header may have. The
// error completes a sentence that begins with the value's name.
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

// IsZero reports whether e is no address.
func (e Email) IsZero() bool { return e == Email{} }

// key returns what makes an address unique: lower(email) under collation C.
func (e Email) key() string { return strings.ToLower(e.address) }

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
