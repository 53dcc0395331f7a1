package engines

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"

	"github.com/andybalholm/brotli"
)

// ChromiumEnv names the variable with the path of the developer's own Chromium.
const ChromiumEnv = "DIEHARD_CHROMIUM"

const chromiumPackage = "@sparticuz/chromium"

// chromium is a headless browser with its libraries and fonts.
var chromium = group{
	name: "Chromium", folder: "chromium", // change the folder's name if complete changes
	pinned: func(name string, _ lockPkg, p platform) bool {
		return name == chromiumPackage && p == platform{os: "linux", cpu: "x64"}
	},
	complete: unpackChromium,
}

// chromiumScript starts the browser with its own libraries and fonts.
const chromiumScript = `#!/bin/sh
dir=$(cd "$(dirname "$0")" && pwd) || exit
export LD_LIBRARY_PATH="$dir/al2023/lib" FONTCONFIG_PATH="$dir"
exec "$dir/chromium" "$@"
`

// chromiumFonts replaces the font configuration of the package. The package's own
// configuration uses folders below /tmp for fonts and for a cache. The few fonts of the
// package need no cache.
const chromiumFonts = `<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
  <dir prefix="relative">fonts</dir>
  <cachedir>/dev/null</cachedir>
</fontconfig>
`

// Chromium returns the path of a Chromium browser: the browser that ChromiumEnv names, an
// installed browser, or the pinned browser. It downloads the pinned browser in the same
// way as Fetch downloads the engines. It returns an error if no browser is found and none
// is pinned for this platform.
func Chromium(ctx context.Context, o Options) (string, error) {
	if name := os.Getenv(ChromiumEnv); name != "" {
		own, err := exec.LookPath(name)
		if err != nil {
			return "", fmt.Errorf("%s: %w", ChromiumEnv, err)
		}
		return own, nil
	}
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "google-chrome-stable"} {
		if system, err := exec.LookPath(name); err == nil {
			return system, nil
		}
	}
	fetched, err := fetch(ctx, chromium, o)
	if err != nil {
		return "", err
	}
	dir, ok := fetched.find(chromiumPackage)
	if !ok {
		return "", fmt.Errorf("no Chromium is pinned for %s: install it with your package manager, or set %s to its path", thisPlatform(), ChromiumEnv)
	}
	return filepath.Join(dir, "bin", "chromium.sh"), nil
}

// unpackChromium unpacks the archives of the package into one folder and
// removes them.
func unpackChromium(dir string) error {
	bin := filepath.Join(dir, "bin")
	for _, archive := range []struct {
		name   string
		unpack func(root *os.Root, content io.Reader) error
	}{
		{"chromium.br", func(root *os.Root, content io.Reader) error {
			return unpackFile(root, "chromium", 0o755, content)
		}},
		{"al2023.tar.br", func(root *os.Root, content io.Reader) error { // libraries of Amazon Linux 2023
			return unpackTar(root, "al2023", content)
		}},
		{"fonts.tar.br", func(root *os.Root, content io.Reader) error {
			return unpackTar(root, ".", content)
		}},
		{"swiftshader.tar.br", func(root *os.Root, content io.Reader) error { // software rendering
			return unpackTar(root, ".", content)
		}},
	} {
		if err := unpackBrotli(bin, archive.name, archive.unpack); err != nil {
			return fmt.Errorf("unpack %s: %w", archive.name, err)
		}
	}
	if err := os.WriteFile(filepath.Join(bin, "fonts.conf"), []byte(chromiumFonts), 0o644); err != nil { //nolint:gosec // not a secret
		return err //nolint:wrapcheck // the error names the file
	}
	return os.WriteFile(filepath.Join(bin, "chromium.sh"), []byte(chromiumScript), 0o755) //nolint:gosec,wrapcheck // a program; the error names the file
}

// unpackBrotli decompresses a file in dir, passes its content to unpack, and
// removes the file.
func unpackBrotli(dir, name string, unpack func(root *os.Root, content io.Reader) error) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err //nolint:wrapcheck // the error names the folder
	}
	defer func() { _ = root.Close() }()
	file, err := root.Open(name)
	if err != nil {
		return err //nolint:wrapcheck // the error names the file
	}
	err = unpack(root, brotli.NewReader(file))
	_ = file.Close()
	if err != nil {
		return err
	}
	return root.Remove(name) //nolint:wrapcheck // the error names the file
}

// unpackTar unpacks the folders and files of an archive into dir.
func unpackTar(root *os.Root, dir string, archive io.Reader) error {
	files := tar.NewReader(archive)
	for {
		header, err := files.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err //nolint:wrapcheck // the caller names the archive
		}
		name := path.Join(dir, header.Name) //nolint:gosec // root refuses a path outside of it
		switch header.Typeflag {
		case tar.TypeDir:
			err = root.MkdirAll(name, 0o755)
		case tar.TypeReg:
			err = unpackFile(root, name, header.FileInfo().Mode().Perm(), files)
		default:
			err = fmt.Errorf("%s is neither a file nor a folder", header.Name)
		}
		if err != nil {
			return err
		}
	}
}

func unpackFile(root *os.Root, name string, mode os.FileMode, content io.Reader) error {
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err //nolint:wrapcheck // the error names the folder
	}
	file, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err //nolint:wrapcheck // the error names the file
	}
	_, err = io.Copy(file, content)
	return errors.Join(err, file.Close())
}
