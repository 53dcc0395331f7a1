package users_test

import (
	"errors"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/users"
)

// The longest valid address has 254 bytes: a local part of 64 bytes and a domain with
// labels of at most 63 bytes.
var (
	longestLocal  = strings.Repeat("a", 64)
	longLabel     = strings.Repeat("b", 63)
	longestDomain = strings.Join([]string{longLabel, longLabel, strings.Repeat("c", 61)}, ".")
	longestEmail  = longestLocal + "@" + longestDomain
)

func brokenFields(err error) []string {
	GinkgoHelper()
	var invalid *users.ValidationError
	Expect(errors.As(err, &invalid)).To(BeTrue(), "%v", err)
	fields := make([]string, len(invalid.Fields))
	for i, field := range invalid.Fields {
		fields[i] = field.Field
	}
	return fields
}

var _ = Describe("The rules for a user", func() {
	It("allow an address of 254 bytes", func() {
		Expect(longestEmail).To(HaveLen(254))
	})

	DescribeTable("accept the address",
		func(ctx SpecContext, given, want string) {
			created, err := newService(db).Create(ctx, addressed(given))
			Expect(err).NotTo(HaveOccurred())
			Expect(created.Email.String()).To(Equal(want))
		},
		Entry("plain", "ada@example.com", "ada@example.com"),
		Entry("with its domain in lower case", "Ada@EXAMPLE.com", "Ada@example.com"),
		Entry("without the space around it", "\u00a0 ada@example.com\t", "ada@example.com"),
		Entry("with every character of a local part", "!#$%&'*+-/=?^_`{|}~.a0@example.com", "!#$%&'*+-/=?^_`{|}~.a0@example.com"),
		Entry("of an international domain in its xn-- form", "ada@xn--bcher-kva.example", "ada@xn--bcher-kva.example"),
		Entry("of labels with digits and hyphens", "a@b-1.2.x--y.example", "a@b-1.2.x--y.example"),
		Entry("of the maximum length", longestEmail, longestEmail),
	)

	DescribeTable("refuse the address",
		func(given, reason string) {
			_, err := users.ParseNewUser(given, "", "")
			Expect(brokenFields(err)).To(Equal([]string{"email"}))
			Expect(err).To(MatchError(ContainSubstring(reason)))
		},
		Entry("that is empty", "", "must not be empty"),
		Entry("that is white space", " \t ", "must not be empty"),
		Entry("without an @", "ada", "bare address"),
		Entry("without a local part", "@example.com", "bare address"),
		Entry("without a domain", "ada@", "bare address"),
		Entry("with two @", "ada@b@example.com", "bare address"),
		Entry("with a display name", "Ada <ada@example.com>", "bare address"),
		Entry("in brackets", "<ada@example.com>", "bare address"),
		Entry("with a comment", "ada@example.com (Ada)", "bare address"),
		Entry("with a quoted local part", `"ada"@example.com`, "bare address"),
		Entry("with a quoted space", `"a da"@example.com`, "bare address"),
		Entry("with a space", "a da@example.com", "bare address"),
		Entry("with a leading dot", ".ada@example.com", "bare address"),
		Entry("with two dots", "a..da@example.com", "bare address"),
		Entry("with NUL", "a\x00da@example.com", "bare address"),
		Entry("with a line break", "ada@example.com\r\nBcc: b@example.com", "bare address"),
		Entry("in a list of two", "ada@example.com,b@example.com", "bare address"),
		Entry("of an IPv4 literal", "ada@[127.0.0.1]", "must"),
		Entry("of an IPv6 literal", "ada@[IPv6:::1]", "must"),
		Entry("of an IPv4 address", "ada@127.0.0.1", "domain name"),
		Entry("of a single label", "ada@localhost", "domain name"),
		Entry("with a closing dot", "ada@example.com.", "must"),
		Entry("with an empty label", "ada@example..com", "must"),
		Entry("with a label that begins with a hyphen", "ada@-example.com", "domain name"),
		Entry("with a label that ends with a hyphen", "ada@example-.com", "domain name"),
		Entry("with an underscore in the domain", "ada@exa_mple.com", "domain name"),
		Entry("with a label of 64 bytes", "ada@"+longLabel+"b.com", "domain name"),
		Entry("with a local part of 65 bytes", longestLocal+"a@example.com", "64 bytes before the @"),
		Entry("of 255 bytes", longestEmail+"c", "254 bytes"),
		Entry("of an international domain in Unicode", "ada@bücher.example", "xn-- form"),
		Entry("with a local part in Unicode", "адам@example.com", "ASCII"),
		Entry("with the Kelvin sign for a K", "\u212aelvin@example.com", "ASCII"),
		Entry("that is not UTF-8", "ada\xff@example.com", "ASCII"),
	)

	DescribeTable("accept the name",
		func(ctx SpecContext, given, want string) {
			service := newService(db)
			created, err := service.Create(ctx, newUser("ada@example.com", given, given))
			Expect(err).NotTo(HaveOccurred())
			Expect(created.FirstName.String()).To(Equal(want))
			Expect(created.LastName.String()).To(Equal(want))
			Expect(service.Get(ctx, created.ID)).To(Equal(created))
		},
		Entry("that is empty", "", ""),
		Entry("without the space around it", "\n\u2003Ada \u00a0", "Ada"),
		Entry("with markup", `<b>"O'Neil" & \ %s</b>`, `<b>"O'Neil" & \ %s</b>`),
		Entry("in normal form C", "Zoe\u0308", "Zoë"),
		Entry("of 100 characters of four bytes", strings.Repeat("𝔸", 100), strings.Repeat("𝔸", 100)),
		Entry("of 200 code points that compose to 100", strings.Repeat("e\u0301", 100), strings.Repeat("é", 100)),
		Entry("with joiners", "نام\u200cخانوادگی", "نام\u200cخانوادگی"),
	)

	DescribeTable("refuse the name",
		func(given, reason string) {
			_, err := users.ParseNewUser("ada@example.com", given, "")
			Expect(brokenFields(err)).To(Equal([]string{"first_name"}))
			Expect(err).To(MatchError(ContainSubstring(reason)))
			_, err = users.ParseNewUser("ada@example.com", "", given)
			Expect(brokenFields(err)).To(Equal([]string{"last_name"}))
		},
		Entry("with NUL", "A\x00da", "control"),
		Entry("with a line break", "A\nda", "control"),
		Entry("with an escape", "A\x1b[31mda", "control"),
		Entry("with a C1 control", "A\u0085da", "control"),
		Entry("that is not UTF-8", "A\xc3(da", "UTF-8"),
		Entry("with a surrogate", "A\xed\xa0\x80da", "UTF-8"),
		Entry("of 101 characters", strings.Repeat("é", 101), "100 characters"),
	)

	It("report all broken rules at once", func() {
		n, err := users.ParseNewUser("ada", "\x00", "\xff")
		Expect(brokenFields(err)).To(Equal([]string{"email", "first_name", "last_name"}))
		Expect(n).To(Equal(users.NewUser{}))
	})
})
