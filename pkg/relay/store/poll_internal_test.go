package store

import (
	"database/sql"
	"math"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = Describe("The search for late commits", func() {
	var late lateSearch

	// poll polls with these open transactions and returns the id above which it searches.
	poll := func(highest int64, publishers ...string) int64 {
		search := late.next(highest, true, publishers)
		late = search.done(sql.NullInt64{}, 0)
		return search.from
	}

	BeforeEach(func() { late = lateSearch{} })

	It("reads all ids first, then only new ids", func() {
		Expect(poll(1000)).To(Equal(int64(0)))
		Expect(poll(2000)).To(Equal(int64(1000)))
		Expect(poll(2000)).To(Equal(int64(2000)))
	})

	It("reads the ids of a transaction when it has ended", func() {
		Expect(poll(1000)).To(Equal(int64(0)))
		Expect(poll(2000, "3/1")).To(Equal(int64(1000)))
		Expect(poll(3000, "3/1")).To(Equal(int64(2000)), "nobody sees its events yet")
		Expect(poll(4000, "4/1")).To(Equal(int64(1000)))
		Expect(poll(5000)).To(Equal(int64(3000)))
		Expect(poll(5000)).To(Equal(int64(5000)))
	})

	It("reads the ids of a transaction that was open before the first poll", func() {
		Expect(poll(1000, "3/1")).To(Equal(int64(0)))
		Expect(poll(2000, "3/1")).To(Equal(int64(1000)))
		Expect(poll(3000)).To(Equal(int64(0)))
	})

	It("reads the ids of a prepared transaction when it has ended", func() {
		Expect(poll(1000)).To(Equal(int64(0)))
		Expect(poll(2000, "3/1")).To(Equal(int64(1000)))
		Expect(poll(3000, "-1/777")).To(Equal(int64(1000)))
		Expect(poll(4000, "-1/777")).To(Equal(int64(3000)))
		Expect(poll(5000)).To(Equal(int64(1000)))
	})

	It("reads the same ids again until it finds nothing there", func() {
		poll(1000)
		late = late.done(sql.NullInt64{Int64: 7, Valid: true}, 0)
		Expect(poll(2000)).To(Equal(int64(6)))
		Expect(poll(2000)).To(Equal(int64(2000)))
	})

	It("reads all ids while the sequence is behind, and once more afterwards", func() {
		poll(1000)
		for range 2 {
			search := late.next(2000, false, []string{"3/1"})
			Expect(search.from).To(Equal(int64(0)))
			late = search.done(sql.NullInt64{}, 0)
		}
		Expect(poll(2000)).To(Equal(int64(0)))
		Expect(poll(2000)).To(Equal(int64(2000)))
	})

	It("is known before a poll if no transaction was open and nothing was found", func() {
		known := func() bool {
			search, ok := late.idle()
			if ok {
				Expect(search).To(Equal(late.next(late.ceiling, true, nil)))
			}
			return ok
		}
		Expect(known()).To(BeFalse(), "the first search reads all ids")
		poll(1000)
		Expect(known()).To(BeTrue())
		poll(1000, "3/1")
		Expect(known()).To(BeFalse(), "the transaction may end")
		poll(1000)
		Expect(known()).To(BeTrue())
		late = late.done(sql.NullInt64{Int64: 7, Valid: true}, 0)
		Expect(known()).To(BeFalse(), "the event may still be there")
		late = late.next(2000, false, nil).done(sql.NullInt64{}, 0)
		Expect(known()).To(BeFalse(), "the ids do not ascend")
	})

	It("reads the pages of the table one after the other", func() {
		var pages []int64
		for range 4 {
			search := late.next(math.MaxInt64, true, nil)
			pages = append(pages, search.page)
			late = search.done(sql.NullInt64{}, 2*pagesAtOnce+1)
		}
		Expect(pages).To(Equal([]int64{0, pagesAtOnce, 2 * pagesAtOnce, 0}))
	})
})
