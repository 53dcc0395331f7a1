package devstack

import (
	"context"
	"errors"
	"fmt"
	"syscall"
)

// reservesPorts reports whether reservePort keeps the port from other
// processes.
const reservesPorts = true

// reservePort returns a port that the system assigns to no other process until
// release is called. A bound socket that does not listen holds the port. A server that
// sets SO_REUSEADDR, as both engines do, can listen on this port, even when it restarts
// after a kill.
func reservePort(context.Context) (port int, release func(), err error) {
	socket, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("reserve a port: %w", err)
	}
	release = func() { _ = syscall.Close(socket) }
	if err := errors.Join(
		syscall.SetsockoptInt(socket, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1),
		syscall.Bind(socket, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}),
	); err != nil {
		release()
		return 0, nil, fmt.Errorf("reserve a port: %w", err)
	}
	bound, err := syscall.Getsockname(socket)
	address, ok := bound.(*syscall.SockaddrInet4)
	if err != nil || !ok {
		release()
		return 0, nil, fmt.Errorf("reserve a port: not an IPv4 address: %w", err)
	}
	return address.Port, release, nil
}
