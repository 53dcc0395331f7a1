package pqdriver

import "database/sql/driver"

// Dial is what every connection is dialed with.
var Dial = dialer{}.DialContext

// BackendPID returns the process id that the server sent to a connection of this package.
func BackendPID(c driver.Conn) (int64, bool) {
	return backendPID(c.(*conn).pqConn)
}
