package pqdriver

import "database/sql/driver"

// Dial is what every connection is dialed with.
var Dial = dialer{}.DialContext

// BackendPID returns the process id that a connection of this package was told.
func BackendPID(c driver.Conn) (int64, bool) {
	return toldPID(c.(*conn).pqConn)
}
