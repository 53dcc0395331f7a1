//go:build !unix

package pqdriver

import "net"

// speaks cannot tell where sockets have no such call.
func speaks(net.Conn) bool { return false }
