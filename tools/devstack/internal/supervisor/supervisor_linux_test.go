package supervisor_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/supervisor"
)

var _ = Describe("A supervisor on Linux", func() {
	It("ends its process when it is killed", func() {
		s := start(false)
		p, err := s.Run(shell("sleep 600"), supervisor.Output{})
		Expect(err).NotTo(HaveOccurred())
		Expect(syscall.Kill(parentOf(p.PID()), syscall.SIGKILL)).To(Succeed())
		Eventually(p.Done()).Should(BeClosed())
		Expect(p.Err()).To(MatchError("its supervisor was killed"))
		Eventually(lives).WithArguments(p.PID()).Should(BeFalse())
	})
})

// parentOf reads the id of a process's parent from /proc.
func parentOf(pid int) int {
	GinkgoHelper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	Expect(err).NotTo(HaveOccurred())
	_, rest, _ := strings.Cut(string(status), "\nPPid:\t")
	line, _, _ := strings.Cut(rest, "\n")
	parent, err := strconv.Atoi(line)
	Expect(err).NotTo(HaveOccurred())
	return parent
}
