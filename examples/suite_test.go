package examples_test

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/needs"
	"github.com/diehard-outbox/diehard/internal/testengines"
)

func TestExamples(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "examples")
}

var suite = testengines.Start(testengines.Options{Postgres: true, Prepare: func(ctx context.Context) string {
	encoded, err := json.Marshal(prepare(ctx))
	Expect(err).NotTo(HaveOccurred())
	return string(encoded)
}})

// prepare runs once for all processes of the suite.
func prepare(ctx context.Context) (p programs) {
	GinkgoHelper()
	return programs{Examples: compile(ctx), PgBouncer: findPgBouncer(ctx), Python: findPython(ctx)}
}

type programs struct {
	Examples  string  `json:"examples"` // the folder of the built examples in Go
	PgBouncer program `json:"pgbouncer"`
	Python    program `json:"python"`
}

// program is an external program. It may be missing on this machine.
type program struct {
	Path    string   `json:"path"`
	Env     []string `json:"env"`
	Missing string   `json:"missing"` // if the program is missing, how to install it; otherwise empty
}

func prepared() (p programs) {
	GinkgoHelper()
	Expect(json.Unmarshal([]byte(suite.Prepared()), &p)).To(Succeed())
	return p
}

// command returns a command that runs the program. If the program is missing, it skips
// the spec.
func (p program) command(ctx context.Context, args ...string) *exec.Cmd {
	GinkgoHelper()
	if p.Missing != "" {
		needs.LeaveOut(p.Missing)
	}
	cmd := exec.CommandContext(ctx, p.Path, args...) //nolint:gosec // a program that the suite has found
	cmd.Env = append(os.Environ(), p.Env...)
	return cmd
}

// binFolder returns a folder that stays after the suite. The next run uses its content.
func binFolder(names ...string) string {
	GinkgoHelper()
	dir, err := filepath.Abs(filepath.Join("..", "bin", filepath.Join(names...)))
	Expect(err).NotTo(HaveOccurred())
	return dir
}

// unpack unpacks Debian's packages and returns their folder. It returns false if that
// fails.
func unpack(ctx context.Context, name string, packages ...string) (dir string, ok bool) {
	GinkgoHelper()
	dir = binFolder("tools", name)
	output, err := exec.CommandContext(ctx, "./unpack-debian.sh", append([]string{dir}, packages...)...).CombinedOutput() //nolint:gosec // our own script
	if err != nil {
		GinkgoWriter.Printf("unpack %v: %v: %s", packages, err, output)
	}
	return dir, err == nil
}

// compile builds the examples in Go and returns their folder.
func compile(ctx context.Context) string {
	GinkgoHelper()
	dir := binFolder("examples")
	Expect(os.MkdirAll(dir, 0o755)).To(Succeed()) //nolint:gosec // no secret
	for _, args := range [][]string{
		{"build", "-o", dir, "./..."},
		{"test", "-c", "-o", dir + "/shop.test", "./shop"},
	} {
		build := exec.CommandContext(ctx, "go", args...) //nolint:gosec // our own programs
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		output, err := build.CombinedOutput()
		Expect(err).NotTo(HaveOccurred(), string(output))
	}
	return dir
}
