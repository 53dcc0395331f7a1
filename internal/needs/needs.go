// Package needs skips specs that require a program that is missing on the machine.
package needs

import (
	"os"
	"os/exec"

	"github.com/onsi/ginkgo/v2"
)

// AllEnv names the variable that makes specs fail instead of being skipped. `.ci/run`
// sets the variable.
const AllEnv = "DIEHARD_TEST_REQUIRE_ALL"

// LeaveOut skips the spec. The reason names the missing program and the way to install
// it, in one line. `make test` prints each reason once.
func LeaveOut(reason string) {
	ginkgo.GinkgoHelper()
	if os.Getenv(AllEnv) != "" {
		ginkgo.Fail(AllEnv + " is set, but " + reason)
	}
	ginkgo.Skip(reason)
}

// Compiler returns the name of the C compiler: the value of CC, or cc. It skips the spec
// if no C compiler is installed.
func Compiler() string {
	ginkgo.GinkgoHelper()
	compiler := os.Getenv("CC")
	if compiler == "" {
		compiler = "cc"
	}
	if _, err := exec.LookPath(compiler); err != nil {
		LeaveOut("a C compiler is missing: install gcc or clang with your package manager (Debian: apt install gcc libc6-dev)")
	}
	return compiler
}
