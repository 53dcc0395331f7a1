package pqdriver

import "net"

// writeRecorder keeps the error of the last write. If a write fails during the
// handshake, lib/pq returns an error that does not unwrap to the error of the write:
// https://github.com/lib/pq/issues/1396.
type writeRecorder struct {
	net.Conn

	err error
}

// Write implements net.Conn.
func (r *writeRecorder) Write(b []byte) (int, error) {
	n, err := r.Conn.Write(b)
	r.err = err
	return n, err //nolint:wrapcheck // a net.Conn returns plain errors
}

// explain makes err unwrap to the error of the last write if the write failed. r can be
// nil.
func (r *writeRecorder) explain(err error) error {
	if r == nil || r.err == nil {
		return err
	}
	return writeError{error: err, cause: r.err}
}

// writeError has the text of lib/pq's error, because that text names all hosts. It
// unwraps to the error of the write.
type writeError struct {
	error

	cause error
}

// Unwrap returns both errors.
func (e writeError) Unwrap() []error { return []error{e.error, e.cause} }
