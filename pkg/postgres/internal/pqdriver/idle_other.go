//go:build !unix

package pqdriver

import "net"

// hasInput returns false on systems without a non-blocking peek.
func hasInput(net.Conn) bool { return false }
