package chserver

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/ClickHouse/clickhouse-go/v2/lib/column"
)

// The Native format differs with the protocol revision that a client speaks:
// on the wire a block begins with a few flags, and each column tells whether
// its serialization is a custom one. The engine reads and writes revision 0,
// which has neither. The data are the same, so that they are copied as they
// are; but to find where a column ends it must be decoded.

// engineRevision is the revision of the Native format in libchdb.
const engineRevision = 0

// blockColumn is the head of a column.
type blockColumn struct {
	name, kind string
}

// blockReader reads blocks of the Native format. It keeps the bytes of the
// column that it is reading.
type blockReader struct {
	source   io.Reader
	buffered *bufio.Reader
	*proto.Reader

	revision int
	dialect  *column.ServerContext
	kept     []byte
	keeping  bool
}

// newBlockReader reads blocks in a revision of the format, from an engine of
// some version.
func newBlockReader(source io.Reader, revision int, v version) *blockReader {
	b := &blockReader{source: source, revision: revision, dialect: &column.ServerContext{
		VersionMajor: uint64(v.major), //nolint:gosec // a version
		VersionMinor: uint64(v.minor), //nolint:gosec // a version
		VersionPatch: uint64(v.patch), //nolint:gosec // a version
	}}
	// proto.NewReader takes this bufio.Reader for its own, so that what is
	// buffered but not consumed yet is known here.
	b.buffered = bufio.NewReaderSize(blockSource{b}, 128<<10)
	b.Reader = proto.NewReader(b.buffered)
	return b
}

// blockSource is what the buffered reader reads from.
type blockSource struct{ *blockReader }

func (s blockSource) Read(p []byte) (int, error) {
	n, err := s.source.Read(p)
	if s.keeping {
		s.kept = append(s.kept, p[:n]...)
	}
	return n, err //nolint:wrapcheck // a reader in between
}

// keep starts to keep what is consumed.
func (b *blockReader) keep() {
	ahead, _ := b.buffered.Peek(b.buffered.Buffered())
	b.kept, b.keeping = append(b.kept[:0], ahead...), true
}

// taken ends keeping and gives what was consumed.
func (b *blockReader) taken() []byte {
	b.keeping = false
	return b.kept[:len(b.kept)-b.buffered.Buffered()]
}

// atEnd says whether the source has ended.
func (b *blockReader) atEnd() bool {
	_, err := b.buffered.Peek(1)
	return err != nil
}

// head reads the beginning of a block. One without columns ends the data.
func (b *blockReader) head() (proto.Block, error) {
	var head proto.Block
	if proto.FeatureBlockInfo.In(b.revision) {
		if err := head.Info.Decode(b.Reader); err != nil {
			return head, fmt.Errorf("read the block's info: %w", err)
		}
	}
	columns, err := b.UVarInt()
	if err != nil {
		return head, fmt.Errorf("read the number of columns: %w", err)
	}
	rows, err := b.UVarInt()
	if err != nil {
		return head, fmt.Errorf("read the number of rows: %w", err)
	}
	const most = 1 << 30
	if columns > most || rows > most {
		return head, fmt.Errorf("a block of %d columns and %d rows is not plausible", columns, rows)
	}
	head.Columns, head.Rows = int(columns), int(rows)
	return head, nil
}

// columns reads the columns of a block and hands on each and its data, which are
// good during the call only.
func (b *blockReader) columns(head proto.Block, emit func(blockColumn, []byte) error) error {
	for range head.Columns {
		c, err := b.columnHead()
		if err != nil {
			return err
		}
		b.keep()
		if head.Rows > 0 {
			if err := b.skipColumn(c, head.Rows); err != nil {
				return err
			}
		}
		if err := emit(c, b.taken()); err != nil {
			return err
		}
	}
	return nil
}

func (b *blockReader) columnHead() (blockColumn, error) {
	name, err := b.Str()
	if err != nil {
		return blockColumn{}, fmt.Errorf("read a column's name: %w", err)
	}
	kind, err := b.Str()
	if err != nil {
		return blockColumn{}, fmt.Errorf("read the type of column %q: %w", name, err)
	}
	if proto.FeatureCustomSerialization.In(b.revision) {
		custom, err := b.Bool()
		if err != nil {
			return blockColumn{}, fmt.Errorf("read the serialization of column %q: %w", name, err)
		}
		if custom {
			return blockColumn{}, newException(proto.ErrNotImplemented, "NOT_IMPLEMENTED",
				"Column %s has a custom serialization, which this server does not read", name)
		}
	}
	return blockColumn{name: name, kind: kind}, nil
}

// skipColumn consumes a column's data.
func (b *blockReader) skipColumn(c blockColumn, rows int) error {
	if c.kind == "String" { // most of the data, mostly
		return b.skipStrings(c, rows)
	}
	data, err := column.Type(c.kind).Column(c.name, b.dialect)
	if err != nil {
		return newException(proto.ErrNotImplemented, "NOT_IMPLEMENTED",
			"Column %s has a type that this server does not know: %s", c.name, c.kind)
	}
	if prefixed, ok := data.(column.CustomSerialization); ok {
		if err := prefixed.ReadStatePrefix(b.Reader); err != nil {
			return fmt.Errorf("read column %q: %w", c.name, err)
		}
	}
	if err := data.Decode(b.Reader, rows); err != nil {
		return fmt.Errorf("read column %q: %w", c.name, err)
	}
	return nil
}

// skipStrings consumes strings without making a column of them.
func (b *blockReader) skipStrings(c blockColumn, rows int) error {
	for range rows {
		size, err := binary.ReadUvarint(b.buffered)
		if err == nil && size > math.MaxInt32 {
			err = fmt.Errorf("a string of %d bytes is not plausible", size)
		}
		if err == nil {
			_, err = b.buffered.Discard(int(size)) //nolint:gosec // checked
		}
		if err != nil {
			return fmt.Errorf("read column %q: %w", c.name, err)
		}
	}
	return nil
}

// transcode gives blocks that the engine wrote in another revision of the
// format, one by one; each is valid during the call only.
func (s *Server) transcode(blocks []byte, revision int, emit func([]blockColumn, []byte) error) error {
	reader := newBlockReader(bytes.NewReader(blocks), engineRevision, s.version)
	var out proto.Buffer
	for !reader.atEnd() {
		head, err := reader.head()
		if err != nil {
			return err
		}
		out.Reset()
		appendBlockHead(&out, head.Columns, head.Rows, revision)
		columns := make([]blockColumn, 0, head.Columns)
		err = reader.columns(head, func(c blockColumn, data []byte) error {
			columns = append(columns, c)
			appendColumnHead(&out, c, revision)
			out.PutRaw(data)
			return nil
		})
		if err != nil {
			return err
		}
		if err := emit(columns, out.Buf); err != nil {
			return err
		}
	}
	return nil
}

func appendBlockHead(out *proto.Buffer, columns, rows, revision int) {
	proto.Block{
		Info:    proto.BlockInfo{BucketNum: -1},
		Columns: columns,
		Rows:    rows,
	}.EncodeAware(out, revision)
}

func appendColumnHead(out *proto.Buffer, c blockColumn, revision int) {
	out.PutString(c.name)
	out.PutString(c.kind)
	if proto.FeatureCustomSerialization.In(revision) {
		out.PutBool(false)
	}
}

// appendEmptyBlock adds a block without rows: a result's header, or, without
// columns, the end of the data.
func appendEmptyBlock(out *proto.Buffer, columns []blockColumn, revision int) {
	appendBlockHead(out, len(columns), 0, revision)
	for _, c := range columns {
		appendColumnHead(out, c, revision)
	}
}
