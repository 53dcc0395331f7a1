package clickhouse

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/ClickHouse/clickhouse-go/v2/lib/column"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// fill copies the events into the columns of the insert. It then releases large contexts,
// so that memory does not hold them twice during the insert.
func (s *Sink) fill(insert driver.Batch, e *sink.Events) error {
	encoder, _ := s.encoders.Get().(*encoder)
	if encoder == nil {
		encoder = newEncoder()
	}
	if err := encoder.encode(insert.Columns(), e); err != nil {
		return err // and drop the encoder, because it may have read a column incompletely
	}
	encoder.wire = nil
	s.encoders.Put(encoder)
	if len(e.EventContext.Data) > keptBytes {
		e.EventContext = sink.Texts{}
	}
	return nil
}

// encoder fills the driver's columns. It encodes the values in the wire format, and the
// columns decode them. The driver's Append methods would copy each growing column several
// times, and would allocate memory for each value of a LowCardinality column.
type encoder struct {
	reader *proto.Reader // reads from wire
	wire   io.Reader
	buffer []byte
}

func newEncoder() *encoder {
	e := &encoder{}
	e.reader = proto.NewReader(e)
	return e
}

// Read implements io.Reader for the encoder's proto.Reader.
func (e *encoder) Read(p []byte) (int, error) { return e.wire.Read(p) } //nolint:wrapcheck // io.Reader requires the plain error

func (e *encoder) encode(columns []column.Interface, events *sink.Events) error {
	for at, encode := range []func(column.Interface) error{
		columnEventID:         func(c column.Interface) error { return e.uuids(c, events.EventID) },
		columnEventType:       func(c column.Interface) error { return e.dictionary(c, &events.EventType) },
		columnEventDateTime:   func(c column.Interface) error { return e.times(c, events.EventDateTime) },
		columnEnvironment:     func(c column.Interface) error { return e.dictionary(c, &events.Environment) },
		columnEventContext:    func(c column.Interface) error { return e.texts(c, &events.EventContext) },
		columnMetadataVersion: func(c column.Interface) error { return e.integers(c, events.MetadataVersion) },
	} {
		if err := encode(columns[at]); err != nil {
			return fmt.Errorf("%s: %w", columns[at].Name(), err)
		}
	}
	return nil
}

// decode makes the column read the rows from their wire format.
func (e *encoder) decode(c column.Interface, rows int, wire io.Reader) error {
	e.wire = wire
	return c.Decode(e.reader, rows) //nolint:wrapcheck // encode adds the name of the column
}

func (e *encoder) uuids(c column.Interface, ids []uuid.UUID) error {
	if _, ok := c.(*column.UUID); !ok {
		return errType(c)
	}
	return e.decode(c, len(ids), &uuidWire{ids})
}

func (e *encoder) integers(c column.Interface, integers []uint64) error {
	if _, ok := c.(*column.UInt64); !ok {
		return errType(c)
	}
	return e.decode(c, len(integers), &integerWire[uint64]{integers})
}

// times fills a column of DateTime64(6). The driver's Append converts a time to
// nanoseconds in an int64. This range ends in the year 2262. Append would store a wrong
// value for a later time
// (https://github.com/ClickHouse/ch-go/blob/v0.74.0/proto/datetime64.go#L54).
func (e *encoder) times(c column.Interface, times []int64) error {
	dateTime, ok := c.(*column.DateTime64)
	if !ok {
		return errType(c)
	}
	if precision, _ := dateTime.Precision(); precision != int64(proto.PrecisionMicro) {
		return errType(c)
	}
	return e.decode(c, len(times), &integerWire[int64]{times})
}

func errType(c column.Interface) error { return fmt.Errorf("the column is a %s", c.Type()) }

// dictionary fills a column of LowCardinality(String). In a table that an operator has
// created, the column may be a String.
//
// https://github.com/ClickHouse/clickhouse-go/blob/v2.50.0/lib/column/lowcardinality.go#L157
func (e *encoder) dictionary(c column.Interface, d *sink.Dictionary) error {
	if c.Type() != lowCardinality {
		for i := range d.Indexes {
			if err := c.AppendRow(&d.Values[d.Indexes[i]]); err != nil {
				return err //nolint:wrapcheck // encode adds the name of the column
			}
		}
		return nil
	}
	// In the wire format, the first value of the dictionary is the column's default, the
	// empty string.
	keys, distinct := make([]uint32, len(d.Values)), uint32(1)
	for i, value := range d.Values {
		if value != "" {
			keys[i] = distinct
			distinct++
		}
	}
	keyType, keySize := uint64(0), 1
	switch {
	case distinct > math.MaxUint16+1:
		keyType, keySize = 2, 4
	case distinct > math.MaxUint8+1:
		keyType, keySize = 1, 2
	}
	const withValues = 1 << 9 // the block has its own dictionary
	wire := binary.LittleEndian.AppendUint64(e.buffer[:0], withValues|keyType)
	wire = append(binary.LittleEndian.AppendUint64(wire, uint64(distinct)), 0)
	for i, value := range d.Values {
		if keys[i] > 0 {
			wire = append(binary.AppendUvarint(wire, uint64(len(value))), value...)
		}
	}
	wire = binary.LittleEndian.AppendUint64(wire, uint64(len(d.Indexes)))
	wire = slices.Grow(wire, keySize*len(d.Indexes)+4)
	for _, index := range d.Indexes {
		end := len(wire)
		wire = binary.LittleEndian.AppendUint32(wire, keys[index])[:end+keySize]
	}
	e.buffer = wire
	return e.decode(c, len(d.Indexes), bytes.NewReader(wire))
}

const lowCardinality = "LowCardinality(String)"

func (e *encoder) texts(c column.Interface, texts *sink.Texts) error {
	if err := e.reserve(c, len(texts.Ends), len(texts.Data)); err != nil {
		return err
	}
	var text []byte
	for i := range texts.Ends {
		text = texts.At(i)
		if err := c.AppendRow(&text); err != nil {
			return err //nolint:wrapcheck // encode adds the name of the column
		}
	}
	return nil
}

// errReserved ends the read that reserve starts.
var errReserved = errors.New("the column is reserved")

// reserve allocates the column's memory. Without reserve the growing column copies itself
// many times. For 64 MB that takes three times the memory. The driver has no function
// that sets a column's capacity. reserve starts a read of this number of rows and of a
// text of this size. The column allocates the memory, and then the read fails.
func (e *encoder) reserve(c column.Interface, rows, size int) error {
	if _, ok := c.(*column.String); !ok {
		return errType(c)
	}
	// For a text below 128 bytes, the column would allocate the same size for each row.
	length := binary.AppendUvarint(nil, uint64(max(size, 128)))
	err := e.decode(c, rows, io.MultiReader(bytes.NewReader(length), failingReader{}))
	c.Reset()
	if !errors.Is(err, errReserved) {
		return fmt.Errorf("reserve: %w", err)
	}
	return nil
}

type failingReader struct{}

// Read implements io.Reader.
func (failingReader) Read([]byte) (int, error) { return 0, errReserved }

// uuidWire returns ids in the wire format of UUID: two integers in little-endian order.
type uuidWire struct{ rest []uuid.UUID }

// Read implements io.Reader.
func (w *uuidWire) Read(p []byte) (int, error) {
	const size = len(uuid.UUID{})
	n := min(len(p)/size, len(w.rest))
	if n == 0 {
		return 0, io.EOF
	}
	for i, id := range w.rest[:n] {
		binary.LittleEndian.PutUint64(p[size*i:], binary.BigEndian.Uint64(id[:8]))
		binary.LittleEndian.PutUint64(p[size*i+8:], binary.BigEndian.Uint64(id[8:]))
	}
	w.rest = w.rest[n:]
	return size * n, nil
}

// integerWire returns integers in the wire format of 64-bit integers.
type integerWire[T int64 | uint64] struct{ rest []T }

// Read implements io.Reader.
func (w *integerWire[T]) Read(p []byte) (int, error) {
	const size = 8
	n := min(len(p)/size, len(w.rest))
	if n == 0 {
		return 0, io.EOF
	}
	for i, integer := range w.rest[:n] {
		binary.LittleEndian.PutUint64(p[size*i:], uint64(integer))
	}
	w.rest = w.rest[n:]
	return size * n, nil
}
