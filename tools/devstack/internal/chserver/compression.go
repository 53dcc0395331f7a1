package chserver

import (
	"compress/gzip"
	"compress/zlib"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/ClickHouse/ch-go/compress"
	"github.com/ClickHouse/ch-go/proto"
	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"
)

// frameSize is the amount of data that ClickHouse puts into one compressed
// frame.
const frameSize = 1 << 20

// frameReader reads ClickHouse's own compressed frames.
type frameReader struct {
	source *countingReader
	frames *compress.Reader
}

func newFrameReader(source io.Reader) *frameReader {
	counting := &countingReader{source: source}
	return &frameReader{source: counting, frames: compress.NewReader(counting)}
}

// Read implements io.Reader. It returns an error if the data end within a
// frame.
func (f *frameReader) Read(p []byte) (int, error) {
	before := f.source.count
	n, err := f.frames.Read(p)
	switch {
	case err == nil:
		return n, nil
	case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		return n, newException(proto.ErrCannotDecompress, "CANNOT_DECOMPRESS", "Cannot decompress: %v", err)
	case f.source.count == before:
		return n, io.EOF
	default:
		return n, io.ErrUnexpectedEOF
	}
}

type countingReader struct {
	source io.Reader
	count  int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.source.Read(p)
	c.count += int64(n)
	return n, err //nolint:wrapcheck // passes the error through
}

// frameWriter writes ClickHouse's own compressed frames.
type frameWriter struct {
	target io.Writer
	frames *compress.Writer
}

// newFrameWriter returns a writer that compresses with a method of
// network_compression_method; the default is LZ4.
func newFrameWriter(target io.Writer, method string) *frameWriter {
	m := compress.LZ4
	switch strings.ToUpper(method) {
	case "ZSTD":
		m = compress.ZSTD
	case "NONE":
		m = compress.None
	}
	return &frameWriter{target: target, frames: compress.NewWriter(compress.LevelZero, m)}
}

// Write implements io.Writer.
func (f *frameWriter) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		piece := p[:min(len(p), frameSize)]
		if err := f.frames.Compress(piece); err != nil {
			return written, fmt.Errorf("compress: %w", err)
		}
		if _, err := f.target.Write(f.frames.Data); err != nil {
			return written, err //nolint:wrapcheck // passes the error through
		}
		written += len(piece)
		p = p[len(piece):]
	}
	return written, nil
}

// decodeContent decodes an HTTP Content-Encoding.
func decodeContent(encoding string, body io.Reader) (io.Reader, error) {
	var decoded io.Reader
	var err error
	switch strings.ToLower(encoding) {
	case "", "identity":
		return body, nil
	case "gzip":
		decoded, err = gzip.NewReader(body)
	case "deflate":
		decoded, err = zlib.NewReader(body)
	case "br":
		return brotli.NewReader(body), nil
	case "zstd":
		decoded, err = newZstdReader(body)
	default:
		return nil, newException(proto.ErrUnknownCompressionMethod, "UNKNOWN_COMPRESSION_METHOD",
			"Unknown compression method '%s'. Only 'gzip', 'deflate', 'br' and 'zstd' are supported here", encoding)
	}
	if err != nil {
		return nil, newException(proto.ErrCannotDecompress, "CANNOT_DECOMPRESS", "Cannot decompress: %v", err)
	}
	return decoded, nil
}

func newZstdReader(body io.Reader) (io.Reader, error) {
	// With a concurrency of one the decoder starts no goroutines, so it needs
	// no Close.
	return zstd.NewReader(body, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true)) //nolint:wrapcheck // the caller wraps it
}

// encodeContent starts the first supported HTTP content encoding of a client's
// list. It returns "" and nil if the list has no supported encoding.
func encodeContent(accepted string, body io.Writer) (string, io.WriteCloser, error) {
	for name := range strings.SplitSeq(accepted, ",") {
		name, quality, _ := strings.Cut(strings.ToLower(strings.TrimSpace(name)), ";")
		if strings.TrimSpace(quality) == "q=0" {
			continue
		}
		switch name {
		case "gzip":
			return name, gzip.NewWriter(body), nil
		case "deflate":
			return name, zlib.NewWriter(body), nil
		case "br":
			return name, brotli.NewWriterLevel(body, brotli.BestSpeed), nil
		case "zstd":
			encoder, err := zstd.NewWriter(body, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true))
			return name, encoder, err //nolint:wrapcheck // fails only for an invalid option
		}
	}
	return "", nil, nil
}
