package store

import (
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = Describe("The value of uncutSQL", func() {
	event := func(id byte) []byte { return []byte{0, 0, 0, 0, 0, 0, 0, id, 0, 0, 0, 200} }

	It("is read", func() {
		Expect(readUncut(append(event(7), event(9)...))).To(Equal(uncut{ids: []int64{7, 9}, bytes: []int32{200, 200}}))
		Expect(readUncut(nil)).To(Equal(uncut{ids: []int64{}, bytes: []int32{}}))
	})

	DescribeTable("is refused",
		func(packed []byte) {
			_, err := readUncut(packed)
			Expect(err).To(HaveOccurred())
		},
		Entry("if it ends within an event", event(7)[:11]),
		Entry("if the ids are not in ascending order", append(event(9), event(7)...)),
		Entry("if an event occurs twice", append(event(7), event(7)...)),
	)

	DescribeTable("fills a batch",
		func(bytes []int32, expected nextBatch) {
			Expect(uncut{bytes: bytes}.batch(3, 1000)).To(Equal(expected))
		},
		Entry("with nothing", nil, nextBatch{}),
		Entry("with fewer events than fit", []int32{200, 300}, nextBatch{events: 2, bytes: 500}),
		Entry("with events that fit exactly", []int32{500, 500}, nextBatch{events: 2, bytes: 1000}),
		Entry("up to the limit of rows", []int32{1, 1, 1, 1}, nextBatch{events: 3, bytes: 3, isFull: true}),
		Entry("up to the limit of rows, with no event left", []int32{1, 1, 1}, nextBatch{events: 3, bytes: 3, isFull: true}),
		Entry("up to the limit of bytes", []int32{500, 500, 1}, nextBatch{events: 2, bytes: 1000, isFull: true}),
		Entry("with one event that is too large", []int32{1001, 1}, nextBatch{events: 1, bytes: 1001, isFull: true}),
		Entry("with the only event, which is too large", []int32{1001}, nextBatch{events: 1, bytes: 1001}),
	)
})
