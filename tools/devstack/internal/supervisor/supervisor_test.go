package supervisor_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/supervisor"
)

// The test binary also runs as a supervisor, and as a parent that is killed.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "supervise":
			if err := supervisor.Serve(os.Stdin, os.Stdout, len(os.Args) > 2); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		case "parent":
			parent()
		}
	}
	os.Exit(m.Run())
}

// parent starts a process, prints its id and the folder, and waits to be
// killed.
func parent() {
	s, err := supervisor.Start(os.Args[0], true)
	if err != nil {
		panic(err)
	}
	p, err := s.Run(shell(`trap "" HUP; while :; do sleep 1; done`), supervisor.Output{})
	if err != nil {
		panic(err)
	}
	_, _ = fmt.Fprintln(os.Stdout, p.PID(), s.TempDir())
	select {}
}

func TestSupervisor(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyTimeout(30 * time.Second)
	RunSpecs(t, "supervisor")
}

func shell(script string) supervisor.Command {
	return supervisor.Command{Path: "/bin/sh", Args: []string{"-c", script}, StopSignal: syscall.SIGTERM, Grace: time.Second}
}

func lives(pid int) bool { return syscall.Kill(pid, 0) == nil }

func start(temporary bool) *supervisor.Supervisor {
	GinkgoHelper()
	s, err := supervisor.Start(os.Args[0], temporary)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(s.Close)
	return s
}

var _ = Describe("A supervisor", func() {
	It("returns all output of a process and its exit status", func(ctx SpecContext) {
		s := start(false)
		var stdout, stderr bytes.Buffer
		p, err := s.Run(shell(`seq 1 20000; echo oh >&2; exit 3`), supervisor.Output{Stdout: &stdout, Stderr: &stderr})
		Expect(err).NotTo(HaveOccurred())
		Expect(p.Wait(ctx)).To(MatchError("exit status 3"))
		Expect(strings.Count(stdout.String(), "\n")).To(Equal(20000))
		Expect(stdout.String()).To(HaveSuffix("\n20000\n"))
		Expect(stderr.String()).To(Equal("oh\n"))

		By("running another process")
		p, err = s.Run(shell("exit 0"), supervisor.Output{})
		Expect(err).NotTo(HaveOccurred())
		Expect(p.Wait(ctx)).To(Succeed())
	})

	It("returns the error of a process that cannot start, and can then run another process", func(ctx SpecContext) {
		s := start(false)
		_, err := s.Run(supervisor.Command{Path: "/no/such/program"}, supervisor.Output{})
		Expect(err).To(MatchError(And(ContainSubstring("start /no/such/program"), ContainSubstring("no such file"))))
		p, err := s.Run(shell("exit 0"), supervisor.Output{})
		Expect(err).NotTo(HaveOccurred())
		Expect(p.Wait(ctx)).To(Succeed())
	})

	It("runs one process at a time", func() {
		s := start(false)
		p, err := s.Run(shell("sleep 600"), supervisor.Output{})
		Expect(err).NotTo(HaveOccurred())
		_, err = s.Run(shell("exit 0"), supervisor.Output{})
		Expect(err).To(MatchError("a process is already running"))
		p.End(time.Minute, syscall.SIGTERM)
		Expect(p.Err()).To(MatchError(ContainSubstring("terminated")))
	})

	It("kills a process that ignores its signals", func() {
		var out syncedBuffer
		p, err := start(false).Run(shell(`trap "" TERM; echo ready; while :; do sleep 1; done`), supervisor.Output{Stdout: &out})
		Expect(err).NotTo(HaveOccurred())
		Eventually(out.String).Should(Equal("ready\n"))
		p.End(10*time.Millisecond, syscall.SIGTERM)
		Expect(p.Err()).To(MatchError(ContainSubstring("killed")))
		Expect(lives(p.PID())).To(BeFalse())
	})

	It("ends its process and removes its folder when Close is called", func() {
		s := start(true)
		Expect(os.WriteFile(filepath.Join(s.TempDir(), "data"), []byte("x"), 0o600)).To(Succeed())
		p, err := s.Run(shell("sleep 600"), supervisor.Output{})
		Expect(err).NotTo(HaveOccurred())
		s.Close()
		Expect(lives(p.PID())).To(BeFalse())
		Expect(s.TempDir()).NotTo(BeADirectory())
		_, err = s.Run(shell("exit 0"), supervisor.Output{})
		Expect(err).To(MatchError(supervisor.ErrClosed))
	})

	It("ends its process and removes its folder when its parent is killed", func(ctx SpecContext) {
		cmd := exec.CommandContext(context.WithoutCancel(ctx), os.Args[0], "parent") //nolint:gosec // this test binary
		stdout, err := cmd.StdoutPipe()
		Expect(err).NotTo(HaveOccurred())
		Expect(cmd.Start()).To(Succeed())
		var (
			pid int
			dir string
		)
		_, err = fmt.Fscan(stdout, &pid, &dir)
		Expect(err).NotTo(HaveOccurred())
		Expect(lives(pid)).To(BeTrue())
		Expect(dir).To(BeADirectory())

		Expect(cmd.Process.Kill()).To(Succeed())
		_ = cmd.Wait()
		Eventually(lives).WithArguments(pid).Should(BeFalse())
		Eventually(func() string { return dir }).ShouldNot(BeADirectory())
	})
})

// syncedBuffer is safe for concurrent reads and writes.
type syncedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
