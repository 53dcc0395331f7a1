package cli

import "runtime/debug"

// unversioned is the version of a build that nobody gave one.
const unversioned = "dev"

// version returns the version that the linker set, or else the one that the go
// command recorded: `go install …@v1.2.3` sets no linker flag. info may be nil.
func version(linked string, info *debug.BuildInfo) string {
	if linked != "" && linked != unversioned {
		return linked
	}
	// The go command writes "(devel)" when it builds a checkout without its
	// version control.
	if info != nil && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return unversioned
}
