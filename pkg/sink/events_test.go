package sink_test

import (
	"fmt"
	"testing"

	"github.com/google/uuid"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

func TestSink(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "sink")
}

var _ = Describe("Dictionary", func() {
	It("keeps each value once", func() {
		var d sink.Dictionary
		buffer := make([]byte, 1)
		for _, value := range "abbaca" {
			buffer[0] = byte(value)
			d.Append(buffer)
		}
		Expect(d.Len()).To(Equal(6))
		Expect(d.Values).To(Equal([]string{"a", "b", "c"}))
		Expect(d.Indexes).To(Equal([]uint32{0, 1, 1, 0, 2, 0}))
		Expect(d.At(4)).To(Equal("c"))
	})

	It("can contain the empty string", func() {
		var d sink.Dictionary
		d.Append(nil)
		d.Append([]byte("a"))
		d.Append(nil)
		Expect(d.Values).To(Equal([]string{"", "a"}))
		Expect(d.Indexes).To(Equal([]uint32{0, 1, 0}))
	})

	It("is empty after a reset", func() {
		var d sink.Dictionary
		d.Append([]byte("a"))
		d.Append([]byte("b"))
		d.Reset()
		Expect(d.Len()).To(BeZero())
		d.Append([]byte("b"))
		Expect(d.Values).To(Equal([]string{"b"}))
		Expect(d.Indexes).To(Equal([]uint32{0}))
	})
})

var _ = Describe("Texts", func() {
	It("keeps each text", func() {
		var t sink.Texts
		buffer := []byte("xyz")
		t.Append(nil)
		t.Append(buffer)
		t.Append(buffer[:1])
		clear(buffer)
		t.Append(nil)
		Expect(t.Len()).To(Equal(4))
		for i, text := range []string{"", "xyz", "x", ""} {
			Expect(string(t.At(i))).To(Equal(text))
		}
	})

	It("allocates memory once for Grow, and keeps its texts", func() {
		var t sink.Texts
		t.Append([]byte("a"))
		t.Grow(2, 1000)
		const memory = 1001
		Expect(t.Data).To(HaveCap(memory))
		t.Append(make([]byte, 500))
		t.Append(make([]byte, 500))
		Expect(t.Data).To(HaveCap(memory))
		Expect(string(t.At(0))).To(Equal("a"))
		t.Reset()
		t.Grow(1, 1001)
		Expect(t.Data).To(HaveCap(memory))
	})
})

var _ = Describe("Events", func() {
	It("are reset in all columns", func() {
		var e sink.Events
		for n := range 2 {
			e.Grow(1, 10)
			e.EventID = append(e.EventID, uuid.UUID{byte(n)})
			e.EventType.Append([]byte("created"))
			e.EventDateTime = append(e.EventDateTime, int64(n))
			e.Environment.Append(fmt.Append(nil, "Test ", n))
			e.EventContext.Append(fmt.Append(nil, n))
			e.MetadataVersion = append(e.MetadataVersion, uint64(n))
			Expect(e.Len()).To(Equal(1))
			Expect([]int{
				e.EventType.Len(), len(e.EventDateTime), e.Environment.Len(), e.EventContext.Len(), len(e.MetadataVersion),
			}).To(HaveEach(1))
			Expect(e.Environment.At(0)).To(Equal(fmt.Sprint("Test ", n)))
			Expect(string(e.EventContext.At(0))).To(Equal(fmt.Sprint(n)))
			e.Reset()
			Expect(e.Len()).To(BeZero())
		}
	})
})
