//go:build unix

package pqdriver

import (
	"errors"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// hasInput reports whether an idle connection has input: the end of the stream, or the
// error that the server sends before it closes the connection. It consumes no input
// and does not block.
//
// lib/pq notices a closed connection only when it sends a statement. The outcome of
// the statement is then unknown, and database/sql may send it twice:
// https://github.com/lib/pq/issues/939.
func hasInput(conn net.Conn) bool {
	socket, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return true
	}
	var readErr error
	err = raw.Read(func(fd uintptr) bool {
		_, _, readErr = unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return true
	})
	return err != nil || !errors.Is(readErr, unix.EAGAIN)
}
