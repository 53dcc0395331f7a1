//go:build !linux

package supervisor

import "syscall"

// Only Linux can tie a process to its parent's life.
func sysProcAttr(Command) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{}
}
