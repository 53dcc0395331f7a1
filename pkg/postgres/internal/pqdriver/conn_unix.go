//go:build unix

package pqdriver

import (
	"errors"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// speaks reports whether there is something to read from an idle connection: its
// end, or what the server says before it ends it. Else it has nothing to say. It
// takes nothing out, and does not wait.
func speaks(conn net.Conn) bool {
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
