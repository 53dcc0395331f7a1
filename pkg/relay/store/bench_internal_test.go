package store

import (
	"encoding/binary"
	"testing"
)

// BenchmarkMultirange encodes the ids of a batch: consecutive ids, and every second id.
func BenchmarkMultirange(b *testing.B) {
	for step, name := range map[int64]string{1: "dense", 2: "sparse"} {
		b.Run(name, func(b *testing.B) {
			ids := make([]int64, DefaultMaxRows)
			for i := range ids {
				ids[i] = int64(i) * step
			}
			b.ReportAllocs()
			for b.Loop() {
				_ = multirange(ids)
			}
		})
	}
}

// BenchmarkUncut forms a batch from the events that a cut finds.
func BenchmarkUncut(b *testing.B) {
	var packed []byte
	for id := range int64(DefaultMaxRows) {
		packed = appendBigint(packed, id+1)
		packed = binary.BigEndian.AppendUint32(packed, 300)
	}
	b.SetBytes(int64(len(packed)))
	b.ReportAllocs()
	for b.Loop() {
		events, err := readUncut(packed)
		if err != nil {
			b.Fatal(err)
		}
		_ = multirange(events.ids[:events.batch(DefaultMaxRows, DefaultMaxBytes).events])
	}
}

// BenchmarkDecode decodes a batch in the format in which PostgreSQL returns it.
func BenchmarkDecode(b *testing.B) {
	const events = 50_000
	var c chunk
	for id := range int64(events) {
		c.add(id, "", `{"user_id":"0190c2f0-7f3a-7cc1-b0a8-2b7a3f2f6c11","email":"user@example.com"}`)
	}
	b.SetBytes(int64(len(c.keys) + len(c.types) + len(c.environments) + len(c.contexts)))
	b.ReportAllocs()
	var decoded Events
	for b.Loop() {
		decoded.Reset()
		if err := c.appendTo(&decoded); err != nil {
			b.Fatal(err)
		}
	}
}
