package engines

import (
	"context"
	"path/filepath"
)

const axePackage = "axe-core"

// axe is a script that checks a page in a browser for accessibility.
var axe = group{
	name: "axe-core", folder: "axe",
	pinned:   func(name string, _ lockPkg, _ platform) bool { return name == axePackage },
	complete: func(string) error { return nil },
}

// Axe returns the path of the script axe-core. It downloads the script in the same way as
// Fetch downloads the engines.
func Axe(ctx context.Context, o Options) (string, error) {
	fetched, err := fetch(ctx, axe, o)
	if err != nil {
		return "", err
	}
	dir, _ := fetched.find(axePackage)
	return filepath.Join(dir, "axe.min.js"), nil
}
