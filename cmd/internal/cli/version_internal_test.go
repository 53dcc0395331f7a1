package cli

import (
	"runtime/debug"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

func TestCLI(t *testing.T) {
	t.Parallel()
	RegisterFailHandler(Fail)
	RunSpecs(t, "cli")
}

var _ = DescribeTable("The version of a build",
	func(linked string, info *debug.BuildInfo, expected string) {
		Expect(version(linked, info)).To(Equal(expected))
	},
	Entry("is the version set by the linker", "v1.2.3", &debug.BuildInfo{Main: debug.Module{Version: "v9.9.9"}}, "v1.2.3"),
	Entry("is the module version if the linker set none", "dev", &debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}}, "v1.2.3"),
	Entry("is the module version if the linker set an empty version", "", &debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}}, "v1.2.3"),
	Entry("is dev in a checkout", "dev", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, "dev"),
	Entry("is dev if the module version is empty", "dev", &debug.BuildInfo{}, "dev"),
	Entry("is dev without build information", "dev", nil, "dev"),
)
