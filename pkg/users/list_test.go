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
		created, err := service.Create(ctx, users.NewUser{Email: email})
		Expect(err).NotTo(HaveOccurred())
		return created
	}

	It("knows no user of another id", func(ctx SpecContext) {
		_, err := service.Get(ctx, uuid.New())
		Expect(err).To(MatchError(users.ErrNotFound))
	})

	It("lists nobody where there is nobody", func(ctx SpecContext) {
		Expect(service.List(ctx, users.ListParams{Limit: 10})).To(Equal(users.Page{Users: []users.User{}}))
	})

	It("shows every user once, the newest first, while others are created between the pages", func(ctx SpecContext) {
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
			page, err := service.List(ctx, users.ListParams{Limit: 10, Cursor: cursor})
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

	It("gives no cursor after a last page that is full", func(ctx SpecContext) {
		create(ctx, "a@example.com")
		create(ctx, "b@example.com")
		page, err := service.List(ctx, users.ListParams{Limit: 2})
		Expect(err).NotTo(HaveOccurred())
		Expect(page.Users).To(HaveLen(2))
		Expect(page.NextCursor).To(BeEmpty())
	})

	It("finds the user of an address in whatever case", func(ctx SpecContext) {
		ada := create(ctx, "Ada@example.com")
		create(ctx, "b@example.com")
		Expect(service.List(ctx, users.ListParams{Limit: 10, Email: "aDA@eXample.com"})).
			To(Equal(users.Page{Users: []users.User{ada}}))
		Expect(service.List(ctx, users.ListParams{Limit: 10, Email: "c@example.com"})).
			To(Equal(users.Page{Users: []users.User{}}))
	})

	DescribeTable("refuses",
		func(ctx SpecContext, params users.ListParams, field string) {
			_, err := service.List(ctx, params)
			Expect(brokenFields(err)).To(Equal([]string{field}))
		},
		Entry("a limit of 0", users.ListParams{}, "limit"),
		Entry("a negative limit", users.ListParams{Limit: -1}, "limit"),
		Entry("a limit above the highest", users.ListParams{Limit: users.MaxLimit + 1}, "limit"),
		Entry("an address that is none", users.ListParams{Limit: 1, Email: "ada\x00"}, "email"),
		Entry("a cursor that is none", users.ListParams{Limit: 1, Cursor: "next"}, "cursor"),
		Entry("a cursor of another length", users.ListParams{Limit: 1, Cursor: "AQ"}, "cursor"),
		Entry("a cursor of another version", users.ListParams{
			Limit:  1,
			Cursor: base64.RawURLEncoding.EncodeToString(append([]byte{2}, make([]byte, 16)...)),
		}, "cursor"),
		Entry("a cursor with a line break", users.ListParams{Limit: 1, Cursor: "AQAAAAAAAAAAAAAAAAAAAA\nA"}, "cursor"),
	)
})
