package pqdriver

import (
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// setUserTimeout limits how long sent data stays unacknowledged. The kernel sends no
// keepalives while data is unacknowledged.
func setUserTimeout(network, _ string, conn syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	var err error
	if controlErr := conn.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(DeadAfter.Milliseconds()))
	}); controlErr != nil {
		return controlErr //nolint:wrapcheck // the dialer wraps it
	}
	return err //nolint:wrapcheck // the dialer wraps it
}
