package outbox

import (
	"encoding/binary"
	"slices"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// appendRow appends a row as record_send writes it; nil is NULL.
func appendRow(chunk []byte, fields ...[]byte) []byte {
	chunk = binary.BigEndian.AppendUint32(chunk, uint32(len(fields))) //nolint:gosec // few
	for _, field := range fields {
		chunk = binary.BigEndian.AppendUint32(chunk, 25) // its type, which nobody looks at
		length := len(field)
		if field == nil {
			length = -1
		}
		chunk = binary.BigEndian.AppendUint32(chunk, uint32(length))
		chunk = append(chunk, field...)
	}
	return chunk
}

func bigint(n int64) []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(n)) //nolint:gosec // PostgreSQL's are signed
}

// eventFields are the fields of an event with that id.
func eventFields(id int64, context string) [][]byte {
	return [][]byte{
		bigint(id), slices.Repeat(bigint(id), 2), []byte("user_created"), bigint(1), []byte("Local"),
		[]byte(context), bigint(1), nil, bigint(-1),
	}
}

var _ = Describe("A chunk of events", func() {
	decode := func(chunk []byte) ([]Record, error) {
		return (&chunkDecoder{types: make(interner), environments: make(interner)}).decode(chunk)
	}

	It("is read without keeping it", func() {
		chunk := appendRow(appendRow(nil, eventFields(7, `{"a":1}`)...), eventFields(9, `"b"`)...)
		records, err := decode(chunk)
		Expect(err).NotTo(HaveOccurred())
		clear(chunk)
		Expect(records).To(HaveExactElements(
			And(HaveField("ID", int64(7)), HaveField("EventContext", `{"a":1}`), HaveField("EventType", "user_created")),
			And(HaveField("ID", int64(9)), HaveField("EventContext", `"b"`), HaveField("Environment", "Local")),
		))
		Expect(records[1].EventID[:]).To(Equal(slices.Repeat(bigint(9), 2)))
		Expect(records[1].EventDateTime).To(Equal(time.Date(2000, 1, 1, 0, 0, 0, 1000, time.UTC)))
		Expect(records[1].PublishedAt).To(Equal(time.Date(1999, 12, 31, 23, 59, 59, 999_999_000, time.UTC)))
		Expect(records[1].Traceparent).To(BeEmpty())
	})

	It("is refused wherever it ends early", func() {
		chunk := appendRow(nil, eventFields(7, `{"a":1}`)...)
		for n := 1; n < len(chunk); n++ {
			_, err := decode(chunk[:n])
			Expect(err).To(HaveOccurred(), "after %d bytes", n)
		}
	})

	DescribeTable("is refused with a row",
		func(spoil func(fields [][]byte) [][]byte) {
			_, err := decode(appendRow(nil, spoil(eventFields(7, `1`))...))
			Expect(err).To(HaveOccurred())
		},
		Entry("of fewer fields", func(fields [][]byte) [][]byte { return fields[1:] }),
		Entry("of more fields", func(fields [][]byte) [][]byte { return append(fields, []byte("a")) }),
		Entry("of a short number", func(fields [][]byte) [][]byte { fields[0] = []byte{1}; return fields }),
		Entry("of a long id", func(fields [][]byte) [][]byte { fields[1] = make([]byte, 17); return fields }),
		Entry("of no time", func(fields [][]byte) [][]byte { fields[3] = nil; return fields }),
	)
})
