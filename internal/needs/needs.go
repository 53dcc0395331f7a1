// Package needs leaves out specs that need what a machine may lack.
package needs

import (
	"os"
	"os/exec"

	"github.com/onsi/ginkgo/v2"
)

// AllEnv names the variable that makes specs fail instead of being left out.
// `.ci/run` sets it.
const AllEnv = "DIEHARD_TEST_REQUIRE_ALL"

// LeaveOut skips the spec. The reason says in one line what is missing and how
// to get it; `make test` prints it once for all specs that give the same.
func LeaveOut(reason string) {
	ginkgo.GinkgoHelper()
	if os.Getenv(AllEnv) != "" {
		ginkgo.Fail(AllEnv + " is set, but " + reason)
	}
	ginkgo.Skip(reason)
}

// Compiler returns the C compiler: cc, or the one that CC names. Without it, the
// spec is left out.
func Compiler() string {
	ginkgo.GinkgoHelper()
	compiler := os.Getenv("CC")
	if compiler == "" {
		compiler = "cc"
	}
	if _, err := exec.LookPath(compiler); err != nil {
		LeaveOut("a C compiler is missing: install gcc or clang from your package manager (Debian: apt install gcc libc6-dev)")
	}
	return compiler
}
