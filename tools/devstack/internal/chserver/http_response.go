package chserver

import (
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// response is the response to one HTTP request. It sends the headers with the first byte
// of the body, so that an error before that byte can still set the status.
type response struct {
	writer  http.ResponseWriter
	request *http.Request
	query   *request
	began   time.Time

	// format and stats are sent in headers.
	format string
	stats  chengine.Stats

	// tag marks an exception that follows a part of the result.
	tag     string
	out     io.Writer // the writer of the result; nil before the headers
	encoded io.Writer // out without ClickHouse's own compression
	encoder io.Closer // the content encoding, or nil
}

func newResponse(w http.ResponseWriter, r *http.Request, q *request) *response {
	return &response{writer: w, request: r, query: q, began: time.Now(), tag: rand.Text()[:16]}
}

// Write sends a part of the result.
func (r *response) Write(p []byte) (int, error) {
	if r.out == nil {
		if err := r.start(http.StatusOK); err != nil {
			return 0, err
		}
	}
	return r.out.Write(p) //nolint:wrapcheck // passes the error through
}

// end finishes the response. If err is not nil, it sends the exception.
func (r *response) end(v version, err error) {
	if err == nil {
		if r.out == nil {
			err = r.start(http.StatusOK)
		}
		if err == nil {
			r.close()
		}
		return
	}

	exception := asException(err)
	text := fmt.Sprintf("%v (version %s)\n", exception, v.text)
	if r.out == nil {
		// A client may read the response only after it has sent the whole body.
		_, _ = io.Copy(io.Discard, r.request.Body)
		r.format = ""
		r.writer.Header().Set("X-ClickHouse-Exception-Code", strconv.Itoa(int(exception.Code)))
		if r.start(httpStatus(exception.Code)) == nil {
			_, _ = io.WriteString(r.out, text)
			r.close()
		}
		return
	}

	// The status is already sent. A marked block carries the error, and a
	// broken end of the body tells the client that the response failed.
	_, _ = fmt.Fprintf(r.encoded, "\r\n__exception__\r\n%s\r\n%s%d %s\r\n__exception__\r\n", r.tag, text, len(text), r.tag)
	r.close()
	_ = http.NewResponseController(r.writer).Flush()
	panic(http.ErrAbortHandler)
}

// start sends the headers and sets up the requested compression.
func (r *response) start(status int) error {
	header := r.writer.Header()
	header.Set("Content-Type", contentType(r.format))
	if r.format != "" {
		header.Set("X-ClickHouse-Format", r.format)
	}
	header.Set("X-ClickHouse-Exception-Tag", r.tag)
	header.Set("X-ClickHouse-Summary", r.summary())

	r.encoded = r.writer
	name, encoder, err := encodeContent(r.request.Header.Get("Accept-Encoding"), r.writer)
	if err != nil {
		return err
	}
	if encoder != nil {
		header.Set("Content-Encoding", name)
		r.encoded, r.encoder = encoder, encoder
	}
	r.out = r.encoded
	if r.query.compress {
		r.out = newFrameWriter(r.encoded, r.query.compressionMethod)
	}
	r.writer.WriteHeader(status)
	return nil
}

// close ends the content encoding. It ignores errors of a client that has
// disconnected.
func (r *response) close() {
	if r.encoder != nil {
		_ = r.encoder.Close()
	}
}

// identify sets the headers that every response has.
func (r *response) identify(v version) {
	header := r.writer.Header()
	header.Set("X-ClickHouse-Server-Display-Name", displayName)
	header.Set("X-ClickHouse-Query-Id", r.query.id)
	header.Set("X-ClickHouse-Timezone", v.timezone)
}

// summary returns the rows and bytes read and written so far.
func (r *response) summary() string {
	return fmt.Sprintf(`{"read_rows":"%d","read_bytes":"%d","written_rows":"%d","written_bytes":"%d","result_rows":"%d","elapsed_ns":"%d"}`,
		r.stats.RowsRead, r.stats.BytesRead, r.stats.RowsWritten, r.stats.BytesWritten, r.stats.RowsReturned, time.Since(r.began).Nanoseconds())
}

// contentType returns the media type of a ClickHouse format.
func contentType(format string) string {
	switch f := strings.ToLower(format); {
	case f == "":
		return "text/plain; charset=UTF-8"
	case f == "native", strings.HasPrefix(f, "rowbinary"), f == "parquet", strings.HasPrefix(f, "arrow"), f == "orc", f == "avro":
		return "application/octet-stream"
	case strings.HasPrefix(f, "json"):
		return "application/json; charset=UTF-8"
	case strings.HasPrefix(f, "csv"):
		return "text/csv; charset=UTF-8"
	case strings.HasPrefix(f, "tabseparated"), strings.HasPrefix(f, "tsv"):
		return "text/tab-separated-values; charset=UTF-8"
	case f == "xml":
		return "application/xml; charset=UTF-8"
	default:
		return "text/plain; charset=UTF-8"
	}
}
