//go:build !linux

package programs

import "os/exec"

// endWithParent does nothing. Only Linux can end a process with its parent.
func endWithParent(*exec.Cmd) {}
