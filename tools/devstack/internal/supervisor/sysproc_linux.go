package supervisor

import "syscall"

func sysProcAttr(c Command) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: c.StopSignal}
}
