//go:build !unix

package postgres

import "net"

// speaks cannot tell where sockets have no such call.
func speaks(net.Conn) bool { return false }
