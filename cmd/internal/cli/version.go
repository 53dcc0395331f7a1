package cli

import "runtime/debug"

// unversioned is the version of a build without a version.
const unversioned = "dev"

// version returns the version set by the linker. If the linker set none, it returns
// the module version that the go command recorded: `go install …@v1.2.3` sets no
// linker flags. info may be nil.
func version(linked string, info *debug.BuildInfo) string {
	if linked != "" && linked != unversioned {
		return linked
	}
	// The go command writes "(devel)" if it builds a checkout without version
	// control data.
	if info != nil && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return unversioned
}
