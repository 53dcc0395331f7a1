//go:build !linux

package supervisor

import "syscall"

// Only Linux can end a process with its parent.
func sysProcAttr(Command) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{}
}
