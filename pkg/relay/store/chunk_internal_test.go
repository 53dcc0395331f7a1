package store

import (
	"bytes"
	"encoding/binary"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

func appendBigint(b []byte, n int64) []byte {
	return binary.BigEndian.AppendUint64(b, uint64(n)) //nolint:gosec // PostgreSQL's are signed
}

// add adds an event to the chunk as readEventsSQL does.
func (c *chunk) add(id int64, traceparent, context string) {
	separated := func(column []byte) []byte {
		if len(c.keys) > 0 {
			column = append(column, 0)
		}
		return column
	}
	c.kinds = append(separated(c.kinds), "user_created/Local/1"...)
	c.contexts = append(separated(c.contexts), context...)
	if traceparent != "" {
		if len(c.traceparents) > 0 {
			c.traceparents = append(c.traceparents, 0)
		}
		c.traceparents = append(appendBigint(c.traceparents, id), traceparent...)
	}
	for _, number := range []int64{id, id, id, 1, -1, id} {
		c.keys = appendBigint(c.keys, number)
	}
}

var _ = Describe("A chunk of events", func() {
	decode := func(c *chunk) ([]Record, error) {
		return (&chunkDecoder{kinds: make(interner)}).decode(c)
	}

	threeEvents := func() *chunk {
		var c chunk
		c.add(7, "", `{"a":1}`)
		c.add(9, "00-1-1-00", `"b"`)
		c.add(300, "00-2-2-00", `2`)
		return &c
	}

	It("is decoded into records that do not refer to it", func() {
		c := threeEvents()
		records, err := decode(c)
		Expect(err).NotTo(HaveOccurred())
		for _, column := range [][]byte{c.keys, c.kinds, c.traceparents, c.contexts} {
			clear(column)
		}
		Expect(records).To(HaveExactElements(
			And(HaveField("ID", int64(7)), HaveField("EventContext", `{"a":1}`), HaveField("Traceparent", "")),
			And(HaveField("ID", int64(9)), HaveField("EventContext", `"b"`), HaveField("Traceparent", "00-1-1-00")),
			And(HaveField("ID", int64(300)), HaveField("EventContext", `2`), HaveField("Traceparent", "00-2-2-00")),
		))
		Expect(records).To(HaveEach(And(HaveField("EventType", "user_created"), HaveField("Environment", "Local/1"))))
		Expect(records[1].EventID[:]).To(Equal(slices.Repeat(appendBigint(nil, 9), 2)))
		Expect(records[1].MetadataVersion).To(Equal(int64(9)))
		Expect(records[1].EventDateTime).To(Equal(time.Date(2000, 1, 1, 0, 0, 0, 1000, time.UTC)))
		Expect(records[1].PublishedAt).To(Equal(time.Date(1999, 12, 31, 23, 59, 59, 999_999_000, time.UTC)))
	})

	It("is put into the order of the ids", func() {
		var c chunk
		c.add(300, "00-2-2-00", "2")
		c.add(7, "", "1")
		c.add(9, "00-1-1-00", "3")
		Expect(decode(&c)).To(HaveExactElements(
			And(HaveField("ID", int64(7)), HaveField("EventContext", "1"), HaveField("Traceparent", "")),
			And(HaveField("ID", int64(9)), HaveField("EventContext", "3"), HaveField("Traceparent", "00-1-1-00")),
			And(HaveField("ID", int64(300)), HaveField("EventContext", "2"), HaveField("Traceparent", "00-2-2-00")),
		))
	})

	It("may have empty texts", func() {
		var c chunk
		c.add(7, "", "")
		c.add(9, "", "")
		Expect(decode(&c)).To(HaveEach(HaveField("EventContext", "")))
	})

	DescribeTable("is refused with",
		func(spoil func(c *chunk)) {
			c := threeEvents()
			spoil(c)
			_, err := decode(c)
			Expect(err).To(MatchError(errChunk))
		},
		Entry("a part of an event's keys", func(c *chunk) { c.keys = c.keys[:len(c.keys)-1] }),
		Entry("keys too few", func(c *chunk) { c.keys = c.keys[keySize:] }),
		Entry("a kind too few", func(c *chunk) { c.kinds = c.kinds[:len(c.kinds)/2] }),
		Entry("a kind too many", func(c *chunk) { c.kinds = append(c.kinds, "\x00a/b"...) }),
		Entry("no kinds", func(c *chunk) { c.kinds = nil }),
		Entry("a type without an environment", func(c *chunk) { c.kinds = bytes.Replace(c.kinds, []byte("/Local/1"), nil, 1) }),
		Entry("a context too few", func(c *chunk) { c.contexts = c.contexts[:len(c.contexts)/2] }),
		Entry("a context too many", func(c *chunk) { c.contexts = append(c.contexts, 0) }),
		Entry("a traceparent of another event", func(c *chunk) { c.traceparents[7] = 8 }),
		Entry("a traceparent too many", func(c *chunk) { c.traceparents = append(c.traceparents, 0) }),
		Entry("a part of an id", func(c *chunk) { c.traceparents = c.traceparents[:7] }),
	)
})
