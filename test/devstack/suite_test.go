// Package devstack_test runs `devstack up` and `devstack demo` with the built
// api and relay.
package devstack_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gexec"

	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

func TestDevstack(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "devstack up")
}

// bin is the folder with api and relay.
var bin string

var _ = SynchronizedBeforeSuite(func(ctx SpecContext) []byte {
	return []byte(programs.Build(programs.Race())(ctx))
}, func(dir []byte) {
	bin = string(dir)
})

// run runs devstack. If devstack still runs at the end of the spec, it is interrupted.
func run(args ...string) *gexec.Session {
	GinkgoHelper()
	return runWith(nil, args...)
}

// runWith is run with additional environment variables.
func runWith(env []string, args ...string) *gexec.Session {
	GinkgoHelper()
	path := os.Getenv(devstack.ProgramEnv)
	Expect(path).NotTo(BeEmpty(), "set %s to the program; `make test` builds it", devstack.ProgramEnv)
	cmd := exec.Command(path, args...) //nolint:gosec,noctx // our own program; ends with the spec
	cmd.Env = slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return strings.HasPrefix(variable, "DIEHARD_") && !strings.HasPrefix(variable, "DIEHARD_DEV_")
	})
	cmd.Env = append(cmd.Env, env...)
	session, err := gexec.Start(cmd, GinkgoWriter, GinkgoWriter)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() {
		session.Interrupt()
		Eventually(session).Should(gexec.Exit())
	})
	return session
}

// up starts a stack on free ports.
func up(dir string, more ...string) *gexec.Session {
	GinkgoHelper()
	return run(append([]string{"up"}, append(flags(dir), more...)...)...)
}

func flags(dir string) []string {
	return []string{
		"--dir", dir, "--bin", bin,
		"--postgres-port", "0", "--clickhouse-http-port", "0", "--clickhouse-native-port", "0",
		"--http-addr", "127.0.0.1:0", "--api-admin-addr", "127.0.0.1:0", "--relay-admin-addr", "127.0.0.1:0",
	}
}

// state is the content of a stack's state file.
type state struct {
	APIURL            string `json:"api_url"`
	APIAdminURL       string `json:"api_admin_url"`
	RelayAdminURL     string `json:"relay_admin_url"`
	PostgresDSN       string `json:"postgres_dsn"`
	ClickHouseHTTPDSN string `json:"clickhouse_http_dsn"`
	APIPID            int    `json:"api_pid"`
	RelayPID          int    `json:"relay_pid"`
	PostgresPID       int    `json:"postgres_pid"`
	ClickHousePID     int    `json:"clickhouse_pid"`
}

// ready waits until the stack is ready and returns its state.
func ready(session *gexec.Session, dir string) state {
	GinkgoHelper()
	Eventually(func(g Gomega) {
		if code := session.ExitCode(); code != -1 {
			StopTrying("devstack ended").Attach("exit code", code).Now()
		}
		g.Expect(string(session.Out.Contents())).To(ContainSubstring("Ctrl-C stops everything.")) // the last line of the panel
	}).Should(Succeed())
	content, err := os.ReadFile(filepath.Join(dir, "state.json"))
	Expect(err).NotTo(HaveOccurred())
	var state state
	Expect(json.Unmarshal(content, &state)).To(Succeed())
	return state
}

// living returns the names of the stack's running processes.
func living(state state) (names []string) {
	for name, pid := range map[string]int{
		"api": state.APIPID, "relay": state.RelayPID, "PostgreSQL": state.PostgresPID, "ClickHouse": state.ClickHousePID,
	} {
		if syscall.Kill(pid, 0) == nil {
			names = append(names, name)
		}
	}
	return names
}
