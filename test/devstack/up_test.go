package devstack_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
	"github.com/onsi/gomega/gexec"
)

var _ = Describe("devstack up", func() {
	var dir string

	BeforeEach(func() { dir = filepath.Join(GinkgoT().TempDir(), "a stack") })

	It("runs everything until it is stopped, and keeps the data", func(ctx SpecContext) {
		first := up(dir)
		state := ready(first, dir)
		Expect(living(state)).To(HaveLen(4))

		By("creating a user with the first printed command")
		panel := string(first.Out.Contents())
		status, body := curl(ctx, panel, `curl -i (\S+) -H 'Content-Type: application/json' -d '([^']+)'`)
		Expect(status).To(Equal(http.StatusCreated), body)
		By("finding the event with the second printed command")
		query := func() string {
			_, body := curl(ctx, panel, `curl '([^']+)' -d '([^']+)'`)
			return body
		}
		Eventually(query).Should(And(ContainSubstring("user_created"), ContainSubstring("Lovelace")))

		By("refusing a second stack in the same folder")
		second := up(dir)
		Eventually(second).Should(gexec.Exit(1))
		Expect(second.Err).To(gbytes.Say("a stack is already running in .*a stack: process [0-9]+, API at http://127.0.0.1:"))
		Expect(living(state)).To(HaveLen(4))

		By("stopping every process")
		first.Interrupt()
		Eventually(first).Should(gexec.Exit(0))
		Expect(living(state)).To(BeEmpty())
		Expect(filepath.Join(dir, "state.json")).NotTo(BeAnExistingFile())

		By("starting again on the same data")
		again := up(dir)
		ready(again, dir)
		panel = string(again.Out.Contents())
		Expect(query()).To(ContainSubstring("Lovelace"))
	})

	It("ends its processes when it is killed, and can start again", func() {
		first := up(dir)
		state := ready(first, dir)
		first.Kill()
		Eventually(first).Should(gexec.Exit())
		Eventually(living).WithArguments(state).Should(BeEmpty())
		ready(up(dir), dir)
	})

	It("ends when one of its processes ends unexpectedly, and shows the end of the log of that process", func() {
		session := up(dir)
		state := ready(session, dir)
		Expect(syscall.Kill(state.RelayPID, syscall.SIGKILL)).To(Succeed())
		Eventually(session).Should(gexec.Exit(1))
		Expect(string(session.Err.Contents())).To(MatchRegexp(`devstack: the relay ended unexpectedly: .*killed; last lines of its log:\n  .*program started`))
		Expect(living(state)).To(BeEmpty())
	})

	It("names every port in use before it starts anything", func(ctx SpecContext) {
		taken, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(taken.Close)
		address := taken.Addr().String()
		_, port, err := net.SplitHostPort(address)
		Expect(err).NotTo(HaveOccurred())
		session := up(dir, "--postgres-port", port, "--http-addr", address)
		Eventually(session).Should(gexec.Exit(1))
		Expect(string(session.Err.Contents())).To(And(
			ContainSubstring("PostgreSQL cannot listen on "+address+": the port is in use; choose another with --postgres-port or DIEHARD_DEVSTACK_POSTGRES_PORT"),
			ContainSubstring("the API cannot listen on "+address+": the port is in use; choose another with --http-addr or DIEHARD_HTTP_ADDR"),
		))
		Expect(filepath.Join(dir, "postgres")).NotTo(BeADirectory())
	})

	It("reports how to build a missing program", func() {
		session := up(dir, "--bin", dir)
		Eventually(session).Should(gexec.Exit(1))
		Expect(session.Err).To(gbytes.Say(`/api: no such file or directory \(make build\)`))
	})

	It("refuses an invalid address", func() {
		session := up(dir, "--http-addr", "localhost")
		Eventually(session).Should(gexec.Exit(1))
		Expect(session.Err).To(gbytes.Say("the API cannot listen on localhost: .*missing port"))
	})
})

var _ = Describe("devstack demo", func() {
	It("creates users and shows them in ClickHouse, on its own stack with an API key or on a running stack", func() {
		dir := GinkgoT().TempDir()
		const apiKey = "a key for the demo"
		asking := fmt.Sprintf("DIEHARD_API_KEYS=%x", sha256.Sum256([]byte(apiKey)))
		demo := func(env ...string) string {
			session := runWith(env, append([]string{"demo", "--users", "300"}, flags(dir)...)...)
			Eventually(session).Should(gexec.Exit(0))
			return string(session.Out.Contents())
		}
		alone := demo(asking, "DIEHARD_DEVSTACK_API_KEY="+apiKey)
		for _, line := range []string{`created +300 +in`, `in ClickHouse +300 .* 300 distinct`, `left in the outbox +0`, `user_created`} {
			Expect(alone).To(MatchRegexp(line))
		}
		Expect(alone).To(ContainSubstring("PostgreSQL is up"))

		state := ready(up(dir), dir)
		Expect(demo()).To(And(
			ContainSubstring("using the running stack: "+state.APIURL),
			MatchRegexp(`in ClickHouse +300 .* 300 distinct`)))
		Expect(living(state)).To(HaveLen(4))
	})
})

// curl sends the request of a printed command. The pattern captures the address and
// the body.
func curl(ctx context.Context, panel, pattern string) (status int, body string) {
	GinkgoHelper()
	parts := regexp.MustCompile(pattern).FindStringSubmatch(panel)
	Expect(parts).NotTo(BeNil(), panel)
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, parts[1], strings.NewReader(parts[2]))
	Expect(err).NotTo(HaveOccurred())
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	Expect(err).NotTo(HaveOccurred())
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	Expect(err).NotTo(HaveOccurred())
	return response.StatusCode, string(content)
}
