package chserver

import (
	"io"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"
)

// The limits of the time for which clickhouse-server waits for the data of an insert.
//
// https://clickhouse.com/docs/operations/settings/settings#receive_timeout
const (
	defaultReceiveTimeout     = 300 * time.Second
	defaultHTTPReceiveTimeout = 30 * time.Second
)

func receiveTimeout(settings []setting) time.Duration {
	for _, s := range settings {
		if s.name == "receive_timeout" {
			if seconds, err := strconv.ParseFloat(s.value, 64); err == nil {
				return time.Duration(seconds * float64(time.Second))
			}
		}
	}
	return defaultReceiveTimeout
}

// impatientConn limits the time of each read while a limit is set.
type impatientConn struct {
	net.Conn

	limit atomic.Int64
}

// Read implements net.Conn.
func (c *impatientConn) Read(p []byte) (int, error) {
	deadline := time.Time{}
	if limit := time.Duration(c.limit.Load()); limit > 0 {
		deadline = time.Now().Add(limit)
	}
	_ = c.SetReadDeadline(deadline)
	return c.Conn.Read(p) //nolint:wrapcheck // the connection's own error
}

// impatientBody limits the time of each read of a request's body.
type impatientBody struct {
	io.ReadCloser

	conn *http.ResponseController
}

// Read implements io.Reader.
func (b impatientBody) Read(p []byte) (int, error) {
	_ = b.conn.SetReadDeadline(time.Now().Add(defaultHTTPReceiveTimeout))
	n, err := b.ReadCloser.Read(p)
	_ = b.conn.SetReadDeadline(time.Time{})
	return n, err //nolint:wrapcheck // the body's own error
}
