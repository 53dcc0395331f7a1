// Package compose_test drives docker-compose.yml with a real container engine.
package compose_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"go.yaml.in/yaml/v3"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/system"
)

func TestCompose(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "compose")
}

const (
	patience = 5 * time.Minute
	api      = "http://127.0.0.1:8080"
	// overrideEnv names another compose file, for example with images of a private registry.
	overrideEnv = "DIEHARD_COMPOSE_OVERRIDE"
)

// stack is a project of docker compose.
type stack struct {
	root    string
	name    string
	version string // of the images of the programs
	files   []string
}

// run runs docker with the arguments and returns its output.
func (s *stack) run(ctx context.Context, args ...string) string {
	GinkgoHelper()
	cmd := exec.CommandContext(ctx, "docker", args...) //nolint:gosec // our own arguments
	cmd.Dir, cmd.Env = s.root, append(os.Environ(), "VERSION="+s.version)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	err := cmd.Run()
	fmt.Fprintf(GinkgoWriter, "$ docker %s\n%s%s", strings.Join(args, " "), out.String(), problems.String())
	Expect(err).NotTo(HaveOccurred(), "docker %s: %s", strings.Join(args, " "), problems.String())
	return strings.TrimSpace(out.String())
}

func (s *stack) compose(ctx context.Context, args ...string) string {
	GinkgoHelper()
	whole := []string{"compose", "--project-name", s.name}
	for _, file := range s.files {
		whole = append(whole, "--file", file)
	}
	return s.run(ctx, append(whole, args...)...)
}

// up starts the stack with this number of relays.
func (s *stack) up(ctx context.Context, relays int, args ...string) {
	GinkgoHelper()
	s.compose(ctx, append([]string{"up", "--detach", "--wait", "--wait-timeout", "300", "--scale", fmt.Sprint("relay=", relays)}, args...)...)
}

// create creates a container that does not run, and removes it after the spec.
func (s *stack) create(ctx context.Context, image string) (container string) {
	GinkgoHelper()
	container = s.run(ctx, "create", image)
	DeferCleanup(func(ctx SpecContext) { s.run(ctx, "rm", container) })
	return container
}

// containers returns the ids of the running containers of a service.
func (s *stack) containers(ctx context.Context, service string) []string {
	GinkgoHelper()
	return strings.Fields(s.compose(ctx, "ps", "--quiet", "--status", "running", service))
}

// address returns where a port of a service can be reached from this machine.
func (s *stack) address(ctx context.Context, service, port string) string {
	GinkgoHelper()
	return s.compose(ctx, "port", service, port)
}

var _ = Describe("docker-compose.yml", Label("compose"), Ordered, func() {
	var s *stack

	BeforeAll(func(ctx SpecContext) {
		if output, err := exec.CommandContext(ctx, "docker", "compose", "version").CombinedOutput(); err != nil {
			Skip("docker compose is missing: " + string(output))
		}
		if output, err := exec.CommandContext(ctx, "docker", "info").CombinedOutput(); err != nil {
			Skip("no container engine runs: " + string(output))
		}
		root, err := testengines.Repository()
		Expect(err).NotTo(HaveOccurred())
		s = &stack{
			root: root, name: "diehard-test-" + uuid.NewString()[:8], version: "first",
			files: []string{filepath.Join(root, "docker-compose.yml"), filepath.Join(root, "test", "compose", "ports.yml")},
		}
		if override := os.Getenv(overrideEnv); override != "" {
			s.files = append(s.files, override)
		}
		DeferCleanup(func(ctx SpecContext) {
			s.compose(ctx, "down", "--volumes", "--timeout", "60")
			for _, version := range []string{"first", "second"} {
				for _, program := range []string{"api", "relay"} {
					_ = exec.CommandContext(ctx, "docker", "image", "rm", "diehard-"+program+":"+version).Run() //nolint:gosec // our own images
				}
			}
		})
		s.compose(ctx, "build")
	})

	It("builds images with nothing but the program, for an unprivileged user", func(ctx SpecContext) {
		for _, program := range []string{"api", "relay"} {
			image := "diehard-" + program + ":first"
			var found []struct {
				Size   int64 `json:"size"`
				Config struct {
					User        string            `json:"user"`
					Labels      map[string]string `json:"labels"`
					Healthcheck struct {
						Test []string `json:"test"`
					} `json:"healthcheck"`
				} `json:"config"`
			}
			Expect(json.Unmarshal([]byte(s.run(ctx, "image", "inspect", image)), &found)).To(Succeed())
			Expect(found).To(HaveLen(1))
			config := found[0].Config
			Expect(config.User).To(Equal("65532:65532"))
			Expect(config.Healthcheck.Test).To(Equal([]string{"CMD", "/" + program, "health"}))
			Expect(config.Labels).To(And(HaveKeyWithValue("org.opencontainers.image.version", "first"), HaveKey("org.opencontainers.image.title")))
			AddReportEntry("size", fmt.Sprintf("%s: %.1f MB", image, float64(found[0].Size)/1e6))

			archive := filepath.Join(GinkgoT().TempDir(), "image.tar")
			s.run(ctx, "export", "--output", archive, s.create(ctx, image))
			listed, err := exec.CommandContext(ctx, "tar", "-tf", archive).Output() //nolint:gosec // our own file
			Expect(err).NotTo(HaveOccurred())
			files := slices.DeleteFunc(strings.Fields(string(listed)), func(name string) bool { return strings.HasSuffix(name, "/") })
			// The engine adds its own files, which a container covers by mounts.
			files = slices.DeleteFunc(files, func(name string) bool {
				return slices.Contains([]string{".dockerenv", "dev/console", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf"}, name)
			})
			Expect(files).To(ConsistOf(program, "etc/ssl/certs/ca-certificates.crt"))
			Expect(s.run(ctx, "run", "--rm", "--read-only", "--cap-drop=ALL", "--network=none", image, "version")).To(ContainSubstring("first"))
		}
	})

	It("has the same bits in two builds", func(ctx SpecContext) {
		digests := func() (all []string) {
			GinkgoHelper()
			dir := GinkgoT().TempDir()
			for _, program := range []string{"api", "relay"} {
				s.run(ctx, "cp", s.create(ctx, "diehard-"+program+":first")+":/"+program, dir+"/")
				sum, err := exec.CommandContext(ctx, "sha256sum", filepath.Join(dir, program)).Output() //nolint:gosec // our own file
				Expect(err).NotTo(HaveOccurred())
				all = append(all, strings.Fields(string(sum))[0])
			}
			return all
		}
		for _, program := range []string{"api", "relay"} { // they lose their name, and are removed after their containers
			image := s.run(ctx, "image", "inspect", "--format", "{{.Id}}", "diehard-"+program+":first")
			DeferCleanup(func(ctx SpecContext) { s.run(ctx, "image", "rm", image) })
		}
		first := digests()
		s.compose(ctx, "build", "--no-cache", "--build-arg", "GOCACHE=/tmp/go-build")
		Expect(digests()).To(Equal(first))
	})

	It("loses and doubles no event while containers come, go, die and are upgraded", func(ctx SpecContext) {
		s.up(ctx, 1)
		// The addresses on this machine change when a container is replaced.
		clickHouse := func() string { return "http://diehard:diehard@" + s.address(ctx, "clickhouse", "8123") + "/diehard" }
		testengines.Query(ctx, "clickhouse", clickHouse(), "ALTER TABLE event_log MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1")

		var acknowledged atomic.Int64
		loading, stop := context.WithCancel(ctx)
		var clients sync.WaitGroup
		defer clients.Wait()
		defer stop()
		for range 4 {
			clients.Go(func() {
				for loading.Err() == nil {
					a, err := system.Post(loading, api+"/v1/users", system.NewUser{Email: uuid.NewString() + "@example.com"})
					if err == nil && a.Status == http.StatusCreated {
						acknowledged.Add(1)
					}
				}
			})
		}
		more := func() {
			GinkgoHelper()
			before := acknowledged.Load()
			Eventually(ctx, acknowledged.Load).WithTimeout(patience).Should(BeNumerically(">=", before+200))
		}
		more()

		By("scaling the relay to 4")
		s.up(ctx, 4, "--no-recreate")
		Expect(s.containers(ctx, "relay")).To(HaveLen(4))
		more()

		By("killing two relays and the API")
		for _, container := range slices.Concat(s.containers(ctx, "relay")[:2], s.containers(ctx, "api")) {
			s.run(ctx, "kill", container)
		}
		s.up(ctx, 4, "--no-recreate")
		more()

		By("restarting both databases")
		s.compose(ctx, "restart", "clickhouse")
		more()
		s.compose(ctx, "restart", "postgres")
		s.up(ctx, 4, "--no-recreate")
		more()

		By("scaling the relay back to 1")
		s.up(ctx, 1, "--no-recreate")
		Expect(s.containers(ctx, "relay")).To(HaveLen(1))
		more()

		By("upgrading the images in place")
		s.version = "second"
		s.compose(ctx, "build")
		s.up(ctx, 2)
		Expect(s.compose(ctx, "exec", "-T", "relay", "relay", "version")).To(ContainSubstring("second"))
		more()
		stop()
		clients.Wait()

		dsn := "postgres://diehard:diehard@" + s.address(ctx, "postgres", "5432") + "/diehard?sslmode=disable"
		last := system.New("", dsn, testengines.ClickHouseDSNs{HTTP: clickHouse()})
		var users int
		Expect(last.Postgres.GetContext(ctx, &users, "SELECT count(*) FROM users")).To(Succeed())
		Expect(users).To(BeNumerically(">=", acknowledged.Load()))
		last.ExpectDelivered(ctx, users)
		Expect(s.compose(ctx, "exec", "-T", "relay", "relay", "status")).To(HavePrefix("Delivering: no event waits."))
		AddReportEntry("load", fmt.Sprintf("%d users acknowledged, %d events delivered", acknowledged.Load(), users))
	})
})

var _ = Describe("docker-compose.yml, without a container engine", func() {
	It("publishes the API and the dashboard only, and only on this machine", func() {
		root, err := testengines.Repository()
		Expect(err).NotTo(HaveOccurred())
		content, err := os.ReadFile(filepath.Join(root, "docker-compose.yml"))
		Expect(err).NotTo(HaveOccurred())
		var config struct {
			Services map[string]struct {
				Ports    []string `yaml:"ports"`
				MemLimit string   `yaml:"mem_limit"` //nolint:tagliatelle // the name of compose
			} `yaml:"services"`
		}
		Expect(yaml.Unmarshal(content, &config)).To(Succeed())
		Expect(config.Services).To(HaveLen(8))
		published := map[string][]string{}
		for name, service := range config.Services {
			if len(service.Ports) > 0 {
				published[name] = service.Ports
			}
			Expect(service.MemLimit).NotTo(BeEmpty(), name)
		}
		Expect(published).To(Equal(map[string][]string{"api": {"127.0.0.1:8080:8080"}, "grafana": {"127.0.0.1:3000:3000"}}))
	})
})
