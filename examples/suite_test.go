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

// prepare is called once for all processes of the suite.
func prepare(ctx context.Context) (p programs) {
	GinkgoHelper()
	return programs{Examples: compile(ctx), PgBouncer: findPgBouncer(ctx), Python: findPython(ctx)}
}

type programs struct {
	Examples  string  `json:"examples"` // the folder of those that are written in Go
	PgBouncer program `json:"pgbouncer"`
	Python    program `json:"python"`
}

// program is one that the machine may lack.
type program struct {
	Path    string   `json:"path"`
	Env     []string `json:"env"`
	Missing string   `json:"missing"` // how to get it, if there is none
}

func prepared() (p programs) {
	GinkgoHelper()
	Expect(json.Unmarshal([]byte(suite.Prepared()), &p)).To(Succeed())
	return p
}

// command returns a command that runs the program. If there is none, the spec is left
// out.
func (p program) command(ctx context.Context, args ...string) *exec.Cmd {
	GinkgoHelper()
	if p.Missing != "" {
		needs.LeaveOut(p.Missing)
	}
	cmd := exec.CommandContext(ctx, p.Path, args...) //nolint:gosec // a program that the suite has found
	cmd.Env = append(os.Environ(), p.Env...)
	return cmd
}

// binFolder returns a folder that outlives the suite, and spares the next run the work.
func binFolder(names ...string) string {
	GinkgoHelper()
	dir, err := filepath.Abs(filepath.Join("..", "bin", filepath.Join(names...)))
	Expect(err).NotTo(HaveOccurred())
	return dir
}

// unpack returns the folder of Debian's packages, unpacked.
func unpack(ctx context.Context, name string, packages ...string) (dir string, ok bool) {
	GinkgoHelper()
	dir = binFolder("tools", name)
	output, err := exec.CommandContext(ctx, "./unpack-debian.sh", append([]string{dir}, packages...)...).CombinedOutput() //nolint:gosec // our own script
	if err != nil {
		GinkgoWriter.Printf("unpack %v: %v: %s", packages, err, output)
	}
	return dir, err == nil
}

// compile returns a folder with the examples that are written in Go.
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
