package httpapi_test

import (
	"os"
	"os/exec"
	"path/filepath"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = Describe("A generated client", func() {
	It("creates a user and publishes events with the types of the document", func(ctx SpecContext) {
		contract, err := filepath.Abs("../../pkg/httpapi/openapi.json")
		Expect(err).NotTo(HaveOccurred())
		dir := GinkgoT().TempDir()
		Expect(os.CopyFS(dir, os.DirFS("../../tools/client"))).To(Succeed())
		run := func(args ...string) string {
			GinkgoHelper()
			command := exec.CommandContext(ctx, "go", args...) //nolint:gosec // the arguments are below
			command.Dir, command.Stderr = dir, GinkgoWriter
			command.Env = append(os.Environ(), "GOFLAGS=-mod=readonly", "GOWORK=off", "OPENAPI="+contract)
			output, err := command.Output()
			Expect(err).NotTo(HaveOccurred())
			return string(output)
		}
		run("generate", ".")
		Expect(run("run", ".", start(ctx).url)).To(MatchRegexp(`^[0-9a-f-]{36}\n$`))
		Expect(count(ctx, "users")).To(Equal(1))
		Expect(count(ctx, "outbox_events")).To(Equal(2))
	})
})
