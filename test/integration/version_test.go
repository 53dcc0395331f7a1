package integration_test

import (
	"archive/zip"
	"context"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/test/programs"
)

const (
	root       = "../.."
	modulePath = "github.com/diehard-outbox/diehard"
	version    = "v0.9.1"
)

var _ = Describe("The version of a program", func() {
	// says runs a program with `version --json` and returns the parsed output.
	says := func(dir, program string) map[string]string {
		GinkgoHelper()
		p := programs.Run(dir, program, []string{"version", "--json"})
		p.Ended()
		var answer map[string]string
		Expect(json.Unmarshal(p.Out.Contents(), &answer)).To(Succeed())
		return answer
	}
	run := func(ctx context.Context, env []string, name string, args ...string) {
		GinkgoHelper()
		cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // only go and sh
		cmd.Dir = root
		cmd.Env = append(os.Environ(), env...)
		output, err := cmd.CombinedOutput()
		Expect(err).NotTo(HaveOccurred(), "%s", output)
	}

	It("is the tag given to go install", Label("long"), func(ctx SpecContext) {
		dir := GinkgoT().TempDir()
		served := filepath.Join(dir, "proxy", filepath.FromSlash(modulePath), "@v")
		Expect(os.MkdirAll(served, 0o750)).To(Succeed())
		goMod, err := os.ReadFile(filepath.Join(root, "go.mod"))
		Expect(err).NotTo(HaveOccurred())
		for name, content := range map[string]string{
			"list": version, version + ".info": `{"Version":"` + version + `"}`, version + ".mod": string(goMod),
		} {
			Expect(os.WriteFile(filepath.Join(served, name), []byte(content), 0o600)).To(Succeed())
		}
		writeModule(filepath.Join(served, version+".zip"))

		output, err := exec.CommandContext(ctx, "go", "env", "GOMODCACHE", "GOPROXY").Output()
		Expect(err).NotTo(HaveOccurred())
		cache, proxy, found := strings.Cut(strings.TrimSpace(string(output)), "\n")
		Expect(found).To(BeTrue())
		// This version exists only for this spec. Therefore the spec has its own module
		// cache, which is filled from the user's cache.
		run(ctx, []string{
			"GOPROXY=file://" + filepath.Join(dir, "proxy") + ",file://" + filepath.Join(cache, "cache", "download") + "," + proxy,
			"GOSUMDB=off", "GOMODCACHE=" + filepath.Join(dir, "modules"), "GOBIN=" + dir, "CGO_ENABLED=0",
			// make build uses the same flags, so most packages are already compiled.
			"GOFLAGS=-trimpath -modcacherw",
		}, "go", "install", modulePath+"/cmd/relay@"+version)
		Expect(says(dir, "relay")).To(And(HaveKeyWithValue("name", "relay"), HaveKeyWithValue("version", version)))
	})

	It("is the version that the images are built with", func(ctx SpecContext) {
		dir := GinkgoT().TempDir()
		dockerfile, err := os.ReadFile(filepath.Join(root, "Dockerfile"))
		Expect(err).NotTo(HaveOccurred())
		Expect(string(dockerfile)).To(ContainSubstring("ARG VERSION="))
		build := regexp.MustCompile(`(?m)CGO_ENABLED=0 .*go build (?:.*\\\n)*.*$`).FindString(string(dockerfile))
		Expect(build).To(ContainSubstring("-o /out/ ./cmd/api ./cmd/relay"), "the Dockerfile's go build")
		run(ctx, []string{"VERSION=" + version}, "sh", "-c", strings.ReplaceAll(build, "/out/", dir+"/"))
		for _, program := range []string{"api", "relay"} {
			Expect(says(dir, program)).To(HaveKeyWithValue("version", version))
		}
	})
})

// writeModule writes the programs' sources in the layout of a module proxy.
func writeModule(path string) {
	GinkgoHelper()
	file, err := os.Create(path)
	Expect(err).NotTo(HaveOccurred())
	defer file.Close()
	archive, sources := zip.NewWriter(file), os.DirFS(root)
	for _, part := range []string{"go.mod", "go.sum", "cmd", "pkg", "db"} {
		Expect(fs.WalkDir(sources, part, func(name string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() || strings.HasSuffix(name, "_test.go") {
				return err
			}
			content, err := fs.ReadFile(sources, name)
			if err != nil {
				return err
			}
			member, err := archive.Create(modulePath + "@" + version + "/" + name)
			if err != nil {
				return err
			}
			_, err = member.Write(content)
			return err
		})).To(Succeed())
	}
	Expect(archive.Close()).To(Succeed())
}
