// Package needs skips specs whose requirements the machine lacks.
package needs

import (
	"os"
	"os/exec"

	"github.com/onsi/ginkgo/v2"
)

// AllEnv names the variable that makes such specs fail instead of being
// skipped. `.ci/run` sets it.
const AllEnv = "DIEHARD_TEST_REQUIRE_ALL"

// LeaveOut skips the spec. The reason says in one line what is missing and how
// to install it. `make test` prints each reason once.
func LeaveOut(reason string) {
	ginkgo.GinkgoHelper()
	if os.Getenv(AllEnv) != "" {
		ginkgo.Fail(AllEnv + " is set, but " + reason)
	}
	ginkgo.Skip(reason)
}

// Compiler returns the C compiler: the one that CC names, or cc. It skips the
// spec if there is none.
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
