package config_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

func TestConfig(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "config")
}

// Specs run without the DIEHARD_ variables of the suite's own environment.
var _ = BeforeEach(func() {
	for _, assignment := range os.Environ() {
		name, value, _ := strings.Cut(assignment, "=")
		if strings.HasPrefix(name, "DIEHARD_") {
			Expect(os.Unsetenv(name)).To(Succeed())
			DeferCleanup(os.Setenv, name, value)
		}
	}
})

// write writes a file and returns its path.
func write(content string) string {
	GinkgoHelper()
	path := filepath.Join(GinkgoT().TempDir(), "config.yaml")
	Expect(os.WriteFile(path, []byte(content), 0o600)).To(Succeed())
	return path
}
