// Package pqdriver is lib/pq as the driver of pkg/postgres. It holds what works around
// lib/pq and nothing else: NewConnector, NewListener and KeepStatements are its
// interface.
//
// Each workaround has a file, whose comment names the issue or the source in lib/pq that
// makes it necessary. The sources are those of v1.12.3. If a later version does not need
// a workaround, its file and its calls in conn.go and connector.go can be removed:
//
//	backendpid.go  reads the process id of a connection
//	begin.go       begins transactions without READ WRITE
//	dialer.go      closes sockets when a context ends
//	dsn.go         sets other defaults, and keeps passwords out of errors
//	idle_unix.go   finds idle connections that the server has ended
//	keepalive.go   makes the kernel notice servers that have gone
//	listener.go    ends a listener with a context, and pings in the background
//	statements.go  keeps statements prepared
//	watchdog.go    gives up connections whose server stays silent
//	writeerror.go  lets errors unwrap to the error of a failed write
package pqdriver
