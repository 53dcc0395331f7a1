package store

import (
	"encoding/binary"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

func appendBigint(b []byte, n int64) []byte {
	return binary.BigEndian.AppendUint64(b, uint64(n)) //nolint:gosec // PostgreSQL's integers are signed
}

// add adds an event to the chunk as readEventsSQL does.
func (c *chunk) add(id int64, traceparent, context string) {
	separated := func(column []byte, separator byte) []byte {
		if len(c.keys) > 0 {
			column = append(column, separator)
		}
		return column
	}
	c.types = append(separated(c.types, '/'), "user_created"...)
	c.environments = append(separated(c.environments, 0), "Local/1"...)
	c.contexts = append(separated(c.contexts, 0), context...)
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
	decode := func(c *chunk) (*Events, error) {
		events := &Events{}
		return events, c.appendTo(events)
	}

	texts := func(column *sink.Texts) []string {
		texts := make([]string, column.Len())
		for i := range texts {
			texts[i] = string(column.At(i))
		}
		return texts
	}

	threeEvents := func() *chunk {
		var c chunk
		c.add(7, "", `{"a":1}`)
		c.add(9, "00-1-1-00", `"b"`)
		c.add(300, "00-2-2-00", `2`)
		return &c
	}

	It("is decoded into columns that do not refer to it", func() {
		c := threeEvents()
		events, err := decode(c)
		Expect(err).NotTo(HaveOccurred())
		for _, column := range [][]byte{c.keys, c.types, c.traceparents, c.environments, c.contexts} {
			clear(column)
		}
		Expect(events.ID).To(Equal([]int64{7, 9, 300}))
		Expect(texts(&events.EventContext)).To(Equal([]string{`{"a":1}`, `"b"`, `2`}))
		Expect(texts(&events.Traceparent)).To(Equal([]string{"", "00-1-1-00", "00-2-2-00"}))
		Expect(events.EventType).To(And(HaveField("Values", []string{"user_created"}), HaveField("Indexes", []uint32{0, 0, 0})))
		Expect(events.Environment).To(And(HaveField("Values", []string{"Local/1"}), HaveField("Indexes", []uint32{0, 0, 0})))
		Expect(events.EventID).To(HaveLen(3))
		Expect(events.EventID[1][:]).To(Equal(slices.Repeat(appendBigint(nil, 9), 2)))
		Expect(events.MetadataVersion).To(Equal([]uint64{7, 9, 300}))
		at := time.Date(2000, 1, 1, 0, 0, 0, 1000, time.UTC).UnixMicro()
		Expect(events.EventDateTime).To(Equal([]int64{at, at, at}))
		at = time.Date(1999, 12, 31, 23, 59, 59, 999_999_000, time.UTC).UnixMicro()
		Expect(events.PublishedAt).To(Equal([]int64{at, at, at}))
	})

	It("is appended to earlier events", func() {
		events, err := decode(threeEvents())
		Expect(err).NotTo(HaveOccurred())
		next := &chunk{}
		next.add(301, "00-3-3-00", "3")
		Expect(next.appendTo(events)).To(Succeed())
		Expect(events.ID).To(Equal([]int64{7, 9, 300, 301}))
		Expect(texts(&events.EventContext)).To(Equal([]string{`{"a":1}`, `"b"`, `2`, "3"}))
		Expect(texts(&events.Traceparent)).To(Equal([]string{"", "00-1-1-00", "00-2-2-00", "00-3-3-00"}))
		Expect(events.EventType.Values).To(HaveLen(1))
	})

	It("is decoded without contexts if it has keys only", func() {
		c := threeEvents()
		c.keysOnly, c.environments, c.contexts = true, nil, nil
		events, err := decode(c)
		Expect(err).NotTo(HaveOccurred())
		Expect(events.ID).To(Equal([]int64{7, 9, 300}))
		Expect(texts(&events.Traceparent)).To(Equal([]string{"", "00-1-1-00", "00-2-2-00"}))
		Expect(events.EventType.Len()).To(Equal(3))
		Expect(events.Environment.Len() + events.EventContext.Len()).To(BeZero())
	})

	DescribeTable("is decoded in the order of the ids", func(keysOnly bool) {
		c := &chunk{keysOnly: keysOnly}
		c.add(300, "00-2-2-00", "2")
		c.add(7, "", "1")
		c.add(9, "00-1-1-00", "3")
		c.types = []byte("third/first/second")
		c.environments = []byte("3\x001\x002")
		events, err := decode(c)
		Expect(err).NotTo(HaveOccurred())
		Expect(events.ID).To(Equal([]int64{7, 9, 300}))
		Expect(events.MetadataVersion).To(Equal([]uint64{7, 9, 300}))
		Expect(events.EventID[2][:]).To(Equal(slices.Repeat(appendBigint(nil, 300), 2)))
		Expect([]string{events.EventType.At(0), events.EventType.At(1), events.EventType.At(2)}).To(Equal([]string{"first", "second", "third"}))
		Expect(texts(&events.Traceparent)).To(Equal([]string{"", "00-1-1-00", "00-2-2-00"}))
		if !keysOnly {
			Expect(texts(&events.EventContext)).To(Equal([]string{"1", "3", "2"}))
			Expect([]string{events.Environment.At(0), events.Environment.At(1), events.Environment.At(2)}).To(Equal([]string{"1", "2", "3"}))
		}
	}, Entry("with contexts", false), Entry("with keys only", true))

	It("may have empty texts", func() {
		var c chunk
		c.add(7, "", "")
		c.add(9, "", "")
		events, err := decode(&c)
		Expect(err).NotTo(HaveOccurred())
		Expect(texts(&events.EventContext)).To(Equal([]string{"", ""}))
	})

	DescribeTable("is refused with",
		func(spoil func(c *chunk)) {
			c := threeEvents()
			spoil(c)
			_, err := decode(c)
			Expect(err).To(MatchError(errChunk))
		},
		Entry("no keys", func(c *chunk) { c.keys = nil }),
		Entry("incomplete keys of an event", func(c *chunk) { c.keys = c.keys[:len(c.keys)-1] }),
		Entry("the keys of one event too few", func(c *chunk) { c.keys = c.keys[keySize:] }),
		Entry("one type too few", func(c *chunk) { c.types = c.types[:len(c.types)/2] }),
		Entry("one type too many", func(c *chunk) { c.types = append(c.types, "/a"...) }),
		Entry("no types", func(c *chunk) { c.types = nil }),
		Entry("one environment too few", func(c *chunk) { c.environments = c.environments[:len(c.environments)/2] }),
		Entry("one environment too many", func(c *chunk) { c.environments = append(c.environments, "\x00b"...) }),
		Entry("no environments", func(c *chunk) { c.environments = nil }),
		Entry("one context too few", func(c *chunk) { c.contexts = c.contexts[:len(c.contexts)/2] }),
		Entry("one context too many", func(c *chunk) { c.contexts = append(c.contexts, 0) }),
		Entry("a traceparent of another event", func(c *chunk) { c.traceparents[7] = 8 }),
		Entry("one traceparent too many", func(c *chunk) { c.traceparents = append(c.traceparents, 0) }),
		Entry("an incomplete id", func(c *chunk) { c.traceparents = c.traceparents[:7] }),
	)
})
