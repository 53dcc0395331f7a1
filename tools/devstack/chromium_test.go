package devstack_test

import (
	"os"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack"
)

var _ = Describe("Chromium", func() {
	It("returns the browser that DIEHARD_CHROMIUM names", func(ctx SpecContext) {
		self, err := os.Executable()
		Expect(err).NotTo(HaveOccurred())
		GinkgoT().Setenv("DIEHARD_CHROMIUM", self)
		Expect(devstack.Chromium(ctx)).To(Equal(self))
	})

	It("fails with the reason in one line", func(ctx SpecContext) {
		GinkgoT().Setenv("DIEHARD_CHROMIUM", "no-such-browser")
		_, err := devstack.Chromium(ctx)
		Expect(err).To(MatchError(MatchRegexp(`^DIEHARD_CHROMIUM: exec: "no-such-browser": .+$`)))
	})
})
