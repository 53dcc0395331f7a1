//go:build !linux

package pqdriver

import "syscall"

// setUserTimeout does nothing where TCP has no such option.
func setUserTimeout(_, _ string, _ syscall.RawConn) error { return nil }
