package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// endWithParent makes the kernel kill the program if the run is killed.
func endWithParent(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}

// tick is the time unit of /proc/PID/stat on every Linux that Go supports.
const tick = 10 * time.Millisecond

// cpuTime returns the CPU time of a process and its children, including
// children that have ended.
func cpuTime(pid int) (time.Duration, error) {
	total, err := ownCPUTime(pid)
	if err != nil {
		return 0, err
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return 0, fmt.Errorf("find the children of a process: %w", err)
	}
	for _, task := range tasks {
		children, err := os.ReadFile(task)
		if err != nil {
			continue // the thread has ended
		}
		for child := range strings.FieldsSeq(string(children)) {
			pid, err := strconv.Atoi(child)
			if err != nil {
				return 0, fmt.Errorf("find the children of a process: %w", err)
			}
			if more, err := cpuTime(pid); err == nil { // a child that has ended is included in its parent's time
				total += more
			}
		}
	}
	return total, nil
}

func ownCPUTime(pid int) (time.Duration, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read a process's CPU time: %w", err)
	}
	// The second field is the program's name in parentheses, which may contain
	// any character.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const userTime, fields4 = 11, 4 // user and system time, of the process and of its children
	var ticks int64
	for _, field := range fields[userTime : userTime+fields4] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read a process's CPU time: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * tick, nil
}

// peakRSS returns the process's peak memory in megabytes.
func peakRSS(pid int) (float64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("read a process's memory: %w", err)
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
			return kib * 1024 / 1e6, err //nolint:wrapcheck // the error names the text
		}
	}
	return 0, fmt.Errorf("process %d has no VmHWM", pid)
}
