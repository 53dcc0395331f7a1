package users

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"golang.org/x/text/unicode/norm"
)

func FuzzParseEmail(f *testing.F) {
	for _, seed := range []string{
		"", "ada@example.com", " Ada@EXAMPLE.com\n", `"a b"@example.com`, "Ada <ada@example.com>", "ada@[127.0.0.1]",
		"ada@bücher.example", "ada@xn--bcher-kva.example", "a\x00@example.com", "a@b@example.com", "\u212a@example.com", "a@\xff.com",
		"ada@example.com (comment)", "a..b@example.com", "=?utf-8?q?a?=@example.com", "a@example.com,b@example.com",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, input string) {
		parsed, err := ParseEmail(input)
		if err != nil {
			return
		}
		email := parsed.String()
		if again, err := ParseEmail(email); err != nil || again != parsed {
			t.Errorf("%q is parsed as %q, which is then parsed as %q, %v", input, email, again, err)
		}
		local, domain, _ := strings.Cut(email, "@")
		if len(email) > MaxEmailBytes || local == "" || !isHostname(domain) || !strings.EqualFold(strings.TrimSpace(input), email) ||
			strings.ContainsFunc(email, func(r rune) bool { return r <= ' ' || r >= unicode.MaxASCII }) {
			t.Errorf("%q is parsed as %q", input, email)
		}
	})
}

func FuzzParseName(f *testing.F) {
	for _, seed := range []string{
		"", "Ada", "\n\u2003Ada \u00a0", "Zoe\u0308", "a\x00", "\xff", "\u200d", strings.Repeat("e\u0301", MaxNameLength), "\ufdfa", "\U0001d15e", "\u0344",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, input string) {
		parsed, err := ParseName(input)
		if err != nil {
			return
		}
		name := parsed.String()
		if again, err := ParseName(name); err != nil || again != parsed {
			t.Errorf("%q is parsed as %q, which is then parsed as %q, %v", input, name, again, err)
		}
		if !utf8.ValidString(name) || !norm.NFC.IsNormalString(name) || utf8.RuneCountInString(name) > MaxNameLength ||
			strings.ContainsFunc(name, unicode.IsControl) || strings.TrimSpace(name) != name {
			t.Errorf("%q is parsed as %q", input, name)
		}
	})
}

func FuzzParseCursor(f *testing.F) {
	for _, seed := range []string{
		"", "A", formatCursor(uuid.Nil), formatCursor(uuid.Max), formatCursor(uuid.Max) + "=", formatCursor(uuid.Nil) + "\n",
		strings.Repeat("_", 23), "Av\x00",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, input string) {
		last, err := parseCursor(input)
		if err == nil && input != "" && formatCursor(last) != input {
			t.Errorf("%q is another spelling of %q", input, formatCursor(last))
		}
	})
}
