package clickhouse

import (
	"testing"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/ClickHouse/clickhouse-go/v2/lib/column"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// block is the block of an insert, without a server.
type block struct {
	driver.Batch

	columns []column.Interface
}

func newBlock(b *testing.B) *block {
	b.Helper()
	columnsOf := make([]column.Interface, len(columns))
	for i, c := range columns {
		made, err := column.Type(c.Type).Column(c.Name, &column.ServerContext{})
		if err != nil {
			b.Fatal(err)
		}
		columnsOf[i] = made
	}
	return &block{columns: columnsOf}
}

// Columns implements driver.Batch.
func (b *block) Columns() []column.Interface { return b.columns }

// BenchmarkEncode encodes a batch, without compression.
func BenchmarkEncode(b *testing.B) {
	const events = 50_000
	context := []byte(`{"user_id":"0190c2f0-7f3a-7cc1-b0a8-2b7a3f2f6c11","email":"user@example.com"}`)
	e := &sink.Events{}
	for range events {
		e.EventID = append(e.EventID, uuid.UUID{1})
		e.EventType.Append([]byte("user_created"))
		e.EventDateTime = append(e.EventDateTime, 1_764_000_000_000_000)
		e.Environment.Append([]byte("Local"))
		e.EventContext.Append(context)
		e.MetadataVersion = append(e.MetadataVersion, 1)
	}
	var s Sink
	var buffer proto.Buffer
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		into := newBlock(b)
		buffer.Reset()
		b.StartTimer()
		if err := s.fill(into, e); err != nil {
			b.Fatal(err)
		}
		for _, c := range into.columns {
			c.Encode(&buffer)
		}
	}
}
