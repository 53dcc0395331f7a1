package users_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"slices"

	"github.com/google/uuid"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/users"
)

var _ = Describe("Finding users", func() {
	var service service

	BeforeEach(func() {
		service = newService(db)
	})

	create := func(ctx context.Context, email string) users.User {
		GinkgoHelper()
		created, err := service.Create(ctx, addressed(email))
		Expect(err).NotTo(HaveOccurred())
		return created
	}

	It("returns ErrNotFound for an unknown id", func(ctx SpecContext) {
		_, err := service.Get(ctx, uuid.New())
		Expect(err).To(MatchError(users.ErrNotFound))
	})

	It("returns an empty list if no users exist", func(ctx SpecContext) {
		Expect(service.List(ctx, listParams("", 10, ""))).To(Equal(users.Page{Users: []users.User{}}))
	})

	It("lists every user once, newest first, while others are created between the pages", func(ctx SpecContext) {
		var want []uuid.UUID
		for i := range 25 {
			want = append(want, create(ctx, fmt.Sprintf("user%d@example.com", i)).ID)
		}
		slices.Reverse(want)

		var (
			got    []uuid.UUID
			sizes  []int
			cursor string
		)
		for {
			page, err := service.List(ctx, listParams("", 10, cursor))
			Expect(err).NotTo(HaveOccurred())
			sizes = append(sizes, len(page.Users))
			for _, user := range page.Users {
				got = append(got, user.ID)
			}
			create(ctx, fmt.Sprintf("meanwhile%d@example.com", len(sizes)))
			cursor = page.NextCursor
			if cursor == "" {
				break
			}
		}
		Expect(got).To(Equal(want))
		Expect(sizes).To(Equal([]int{10, 10, 5}))
	})

	It("returns no cursor after a full last page", func(ctx SpecContext) {
		create(ctx, "a@example.com")
		create(ctx, "b@example.com")
		page, err := service.List(ctx, listParams("", 2, ""))
		Expect(err).NotTo(HaveOccurred())
		Expect(page.Users).To(HaveLen(2))
		Expect(page.NextCursor).To(BeEmpty())
	})

	It("lists the first page of all users for zero parameters", func(ctx SpecContext) {
		for i := range users.DefaultLimit + 1 {
			create(ctx, fmt.Sprintf("user%d@example.com", i))
		}
		page, err := service.List(ctx, users.ListParams{})
		Expect(err).NotTo(HaveOccurred())
		Expect(page.Users).To(HaveLen(users.DefaultLimit))
		Expect(page.NextCursor).NotTo(BeEmpty())
	})

	It("finds a user by the address, ignoring case", func(ctx SpecContext) {
		ada := create(ctx, "Ada@example.com")
		create(ctx, "b@example.com")
		Expect(service.List(ctx, listParams("aDA@eXample.com", 10, ""))).
			To(Equal(users.Page{Users: []users.User{ada}}))
		Expect(service.List(ctx, listParams("c@example.com", 10, ""))).
			To(Equal(users.Page{Users: []users.User{}}))
	})

	DescribeTable("refuses",
		func(email string, limit int, cursor, field string) {
			params, err := users.ParseListParams(email, limit, cursor)
			Expect(brokenFields(err)).To(Equal([]string{field}))
			Expect(params).To(Equal(users.ListParams{}))
		},
		Entry("a limit of 0", "", 0, "", "limit"),
		Entry("a negative limit", "", -1, "", "limit"),
		Entry("a limit above the maximum", "", users.MaxLimit+1, "", "limit"),
		Entry("an invalid address", "ada\x00", 1, "", "email"),
		Entry("an invalid cursor", "", 1, "next", "cursor"),
		Entry("a cursor of another length", "", 1, "AQ", "cursor"),
		Entry("a cursor of another version", "", 1,
			base64.RawURLEncoding.EncodeToString(append([]byte{2}, make([]byte, 16)...)), "cursor"),
		Entry("a cursor with a line break", "", 1, "AQAAAAAAAAAAAAAAAAAAAA\nA", "cursor"),
	)
})
