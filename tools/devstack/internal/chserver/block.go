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

// The Native format depends on the client's protocol revision. On the wire a
// block begins with a few flags, and each column says whether its
// serialization is custom. The engine reads and writes revision 0, which has
// neither these flags nor custom serializations. The data are the same in all revisions,
// so this server copies the data unchanged. It decodes them only to find the end of a
// column.

// engineRevision is the revision of the Native format in libchdb.
const engineRevision = 0

// blockColumn is the head of a column.
type blockColumn struct {
	name, kind string
}

// blockReader reads blocks of the Native format. It keeps the bytes of the
// current column.
type blockReader struct {
	source   io.Reader
	buffered *bufio.Reader
	*proto.Reader

	revision int
	dialect  *column.ServerContext
	kept     []byte
	keeping  bool
}

// newBlockReader returns a reader of blocks in a revision of the format,
// written by an engine of version v.
func newBlockReader(source io.Reader, revision int, v version) *blockReader {
	b := &blockReader{source: source, revision: revision, dialect: &column.ServerContext{
		VersionMajor: uint64(v.major), //nolint:gosec // a version number is small
		VersionMinor: uint64(v.minor), //nolint:gosec // a version number is small
		VersionPatch: uint64(v.patch), //nolint:gosec // a version number is small
	}}
	// proto.NewReader uses this bufio.Reader itself, so that this code knows
	// which bytes are buffered but not consumed.
	b.buffered = bufio.NewReaderSize(blockSource{b}, 128<<10)
	b.Reader = proto.NewReader(b.buffered)
	return b
}

// blockSource is the source of the buffered reader.
type blockSource struct{ *blockReader }

func (s blockSource) Read(p []byte) (int, error) {
	n, err := s.source.Read(p)
	if s.keeping {
		s.kept = append(s.kept, p[:n]...)
	}
	return n, err //nolint:wrapcheck // passes the error through
}

// keep makes the reader keep the bytes that it consumes from now on.
func (b *blockReader) keep() {
	ahead, _ := b.buffered.Peek(b.buffered.Buffered())
	b.kept, b.keeping = append(b.kept[:0], ahead...), true
}

// taken returns the bytes that were kept since the call of keep, and stops keeping.
func (b *blockReader) taken() []byte {
	b.keeping = false
	return b.kept[:len(b.kept)-b.buffered.Buffered()]
}

// atEnd reports whether the source has ended.
func (b *blockReader) atEnd() bool {
	_, err := b.buffered.Peek(1)
	return err != nil
}

// head reads the head of a block. A block without columns ends the data.
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
		return head, fmt.Errorf("invalid block: %d columns and %d rows", columns, rows)
	}
	head.Columns, head.Rows = int(columns), int(rows)
	return head, nil
}

// columns reads the columns of a block and passes each with its data to emit.
// The data are valid only during the call.
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
				"Column %s has an unsupported custom serialization", name)
		}
	}
	return blockColumn{name: name, kind: kind}, nil
}

// skipColumn consumes a column's data.
func (b *blockReader) skipColumn(c blockColumn, rows int) error {
	if c.kind == "String" { // usually most of the data
		return b.skipStrings(c, rows)
	}
	data, err := column.Type(c.kind).Column(c.name, b.dialect)
	if err != nil {
		return newException(proto.ErrNotImplemented, "NOT_IMPLEMENTED",
			"Column %s has an unsupported type: %s", c.name, c.kind)
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

// skipStrings consumes strings without decoding them into a column.
func (b *blockReader) skipStrings(c blockColumn, rows int) error {
	for range rows {
		size, err := binary.ReadUvarint(b.buffered)
		if err == nil && size > math.MaxInt32 {
			err = fmt.Errorf("invalid string length: %d bytes", size)
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

// transcode converts blocks of the engine into another revision of the format
// and passes them to emit one by one. Each block is valid only during the call.
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

// appendEmptyBlock appends a block without rows. With columns it is a result's
// header; without columns it ends the data.
func appendEmptyBlock(out *proto.Buffer, columns []blockColumn, revision int) {
	appendBlockHead(out, len(columns), 0, revision)
	for _, c := range columns {
		appendColumnHead(out, c, revision)
	}
}
