// Package pqdriver is a driver for PostgreSQL on top of lib/pq. It contains only
// workarounds for lib/pq. Its interface is NewConnector, NewListener and KeepStatements.
//
// Each workaround has a file. The comment in the file names the issue or the source of
// lib/pq v1.12.3 that makes it necessary. If a later version does not need a workaround,
// remove its file and its calls in conn.go and connector.go:
//
//	backendpid.go  reads the process id of a connection
//	begin.go       begins transactions without READ WRITE
//	dialer.go      closes sockets when a context ends
//	dsn.go         sets other defaults, splits lists of hosts, and keeps passwords out of
//	               errors
//	idle_unix.go   finds idle connections that the server has closed
//	keepalive.go   makes the kernel detect dead servers
//	listener.go    closes a listener when a context ends, and pings in the background
//	parameters.go  removes or refuses parameters of other drivers
//	session.go     repeats the settings of a shared session in each transaction
//	statements.go  keeps statements prepared
//	watchdog.go    closes connections to a silent server
//	writeerror.go  makes errors unwrap to the error of a failed write
package pqdriver
