package programs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	"golang.org/x/sys/unix"
)

// Terminal returns the two ends of a terminal. A spec writes to keyboard, and a program
// reads the same text from terminal.
func Terminal() (keyboard, terminal *os.File) {
	GinkgoHelper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(keyboard.Close)
	fd := int(keyboard.Fd())
	Expect(unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)).To(Succeed())
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	Expect(err).NotTo(HaveOccurred())
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(terminal.Close)
	return keyboard, terminal
}

// Console is a program that a terminal controls.
type Console struct {
	Keyboard *os.File
	Screen   *gbytes.Buffer // everything that was written to the terminal

	ended chan error
}

// RunInTerminal runs a program of the folder like Run. Its input and output are a terminal
// of 80 columns, which also sends signals: "\x03" from the keyboard interrupts the program.
func RunInTerminal(dir, program string, args []string, env ...string) *Console {
	GinkgoHelper()
	keyboard, terminal := Terminal()
	Expect(unix.IoctlSetWinsize(int(terminal.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 80})).To(Succeed())
	cmd := command(dir, program, args, append([]string{"TERM=xterm"}, env...))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
	cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
	Expect(cmd.Start()).To(Succeed())
	c := &Console{Keyboard: keyboard, Screen: gbytes.BufferReader(keyboard), ended: make(chan error, 1)}
	go func() { c.ended <- cmd.Wait() }()
	DeferCleanup(func() { _ = cmd.Process.Kill() }) // it may have ended
	return c
}

// EndsWith waits until the program ends with the exit code.
func (c *Console) EndsWith(code int) {
	GinkgoHelper()
	var err error
	Eventually(c.ended, Patience).Should(Receive(&err))
	exit := 0
	if failed, ok := errors.AsType[*exec.ExitError](err); ok {
		exit = failed.ExitCode()
	}
	Expect(exit).To(Equal(code), "%s", c.Screen.Contents())
}

// Lines returns the lines that a user sees on the screen. It knows carriage returns and the
// sequence that clears the rest of a line.
func (c *Console) Lines() (lines []string) {
	for line := range strings.SplitSeq(string(c.Screen.Contents()), "\r\n") {
		shown := ""
		for part := range strings.SplitSeq(line, "\r") {
			if rest, cleared := strings.CutPrefix(part, "\x1b[K"); cleared {
				shown, part = "", rest
			}
			shown = part + shown[min(len(part), len(shown)):]
		}
		lines = append(lines, shown)
	}
	return lines
}
