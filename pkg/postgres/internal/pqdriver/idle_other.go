//go:build !unix

package pqdriver

import "net"

// hasInput cannot tell on systems whose sockets have no such call.
func hasInput(net.Conn) bool { return false }
