package programs

import (
	"os/exec"
	"syscall"
)

// endWithParent makes the kernel kill the program if the suite is killed.
func endWithParent(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
