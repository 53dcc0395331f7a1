// Package helm_test renders the chart of deploy/helm for several sets of values, and checks
// the objects against the schemas of Kubernetes, KEDA and the Prometheus operator, and
// against the programs' own configuration.
package helm_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

func TestHelm(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "helm")
}

const (
	root  = "../.."
	chart = root + "/deploy/helm/diehard"
)

// renderer is the path of the program render.
var renderer string

var _ = SynchronizedBeforeSuite(func(ctx SpecContext) []byte {
	dir, err := os.MkdirTemp("", "diehard-helm-")
	Expect(err).NotTo(HaveOccurred())
	path := filepath.Join(dir, "render")
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", path, "./render") //nolint:gosec // a temporary path
	output, err := build.CombinedOutput()
	Expect(err).NotTo(HaveOccurred(), string(output))
	return []byte(path)
}, func(path []byte) {
	renderer = string(path)
})

var _ = SynchronizedAfterSuite(func() {}, func() {
	if renderer != "" {
		Expect(os.RemoveAll(filepath.Dir(renderer))).To(Succeed())
	}
})
