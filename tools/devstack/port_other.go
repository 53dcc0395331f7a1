//go:build !linux

package devstack

import (
	"context"
	"errors"
	"fmt"
	"net"
)

// reservesPorts reports whether reservePort keeps the port from other
// processes.
const reservesPorts = false

// reservePort returns a port that is free at this moment. Only Linux can reserve a port.
// On other systems another process may take the port before the server starts, or while
// the server is down.
func reservePort(ctx context.Context) (port int, release func(), err error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp4", net.JoinHostPort(loopback, "0"))
	if err != nil {
		return 0, nil, fmt.Errorf("find a free port: %w", err)
	}
	address, ok := listener.Addr().(*net.TCPAddr)
	if !ok {
		return 0, nil, errors.New("find a free port: not a TCP address")
	}
	return address.Port, func() {}, listener.Close()
}
