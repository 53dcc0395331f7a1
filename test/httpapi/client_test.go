package httpapi_test

import (
	"os"
	"os/exec"
	"path/filepath"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/httpapi"
	"github.com/diehard-outbox/diehard/pkg/httpapi/scope"
)

var _ = Describe("A generated client", func() {
	It("creates, changes and deletes users and publishes events with the types of the document", func(ctx SpecContext) {
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
		api := start(ctx, withKeys("secret-all", "secret-reader"), func(o *httpapi.Options) { o.Keys[1].Scopes = []string{scope.ReadUsers} })
		Expect(run("run", ".", api.url, "secret-all", "secret-reader")).To(MatchRegexp(`^[0-9a-f-]{36}\n$`))
		Expect(count(ctx, "users")).To(BeZero())
		for eventType, n := range map[string]int{"user_created": 3, "user_updated": 2, "user_deleted": 3, "order_placed": 1} {
			Expect(count(ctx, "outbox_events WHERE event_type = '"+eventType+"'")).To(Equal(n), eventType)
		}
	})
})
