package pqdriver

import "reflect"

// backendPID returns the process id that the server sent at the start of the
// connection. lib/pq keeps it in a private field:
// https://github.com/lib/pq/blob/v1.12.3/conn.go#L180. If a later version of lib/pq
// lacks the field, ok is false and no statement is kept prepared.
func backendPID(c pqConn) (pid int64, ok bool) {
	if field := reflect.Indirect(reflect.ValueOf(c)).FieldByName("pid"); field.IsValid() && field.CanInt() {
		return field.Int(), true
	}
	return 0, false
}
