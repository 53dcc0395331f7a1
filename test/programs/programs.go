// Package programs runs the built programs for a Ginkgo suite.
package programs

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gexec"

	"github.com/diehard-outbox/diehard/internal/testengines"
)

// Patience limits the start and the end of a program.
const Patience = time.Minute

// Race returns go build's flag for the race detector, if the suite itself runs with
// the race detector.
func Race() string {
	info, ok := debug.ReadBuildInfo()
	race := ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
	return fmt.Sprint("-race=", race)
}

// Build returns a function that builds api and relay, with flags of go build,
// into a temporary folder that is removed after the suite. The function returns
// the folder.
func Build(flags ...string) func(ctx context.Context) string {
	return func(ctx context.Context) string {
		GinkgoHelper()
		dir, err := os.MkdirTemp("", "diehard-programs-*")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(os.RemoveAll, dir)
		args := append([]string{"build", "-buildvcs=false", "-o", dir}, flags...)
		cmd := exec.CommandContext(ctx, "go", append(args, "./cmd/api", "./cmd/relay")...) //nolint:gosec // our own folder and flags
		// The build runs in the product's module, so the programs have the versions of
		// the dependencies that users get.
		cmd.Dir, err = testengines.Repository()
		Expect(err).NotTo(HaveOccurred())
		output, err := cmd.CombinedOutput()
		Expect(err).NotTo(HaveOccurred(), "%s", output)
		return dir
	}
}

// Process is a running program. It is stopped at the end of the spec. It must then exit
// with 0, unless the spec has checked the program's end.
type Process struct {
	*gexec.Session

	settled bool // the spec has checked its end
}

// Run runs a program of the folder with these variables, NAME=VALUE. The
// program does not inherit Diehard's variables from the suite.
func Run(dir, program string, args []string, env ...string) *Process {
	GinkgoHelper()
	return RunOn(nil, dir, program, args, env...)
}

// RunOn is like Run, with a standard input.
func RunOn(stdin io.Reader, dir, program string, args []string, env ...string) *Process {
	GinkgoHelper()
	cmd := command(dir, program, args, env)
	cmd.Stdin = stdin
	prefix := func() *gexec.PrefixedWriter { return gexec.NewPrefixedWriter(program+" | ", GinkgoWriter) }
	session, err := gexec.Start(cmd, prefix(), prefix())
	Expect(err).NotTo(HaveOccurred())
	p := &Process{Session: session}
	DeferCleanup(func() {
		if !p.settled {
			p.Stop()
		}
	})
	return p
}

// command returns the command of a program that ends with the suite.
func command(dir, program string, args, env []string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(dir, program), args...) //nolint:gosec,noctx // the suite built it; ends with the spec
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return strings.HasPrefix(variable, "DIEHARD_") || strings.HasPrefix(variable, "PG") ||
			strings.HasPrefix(variable, "SENTRY_") || strings.HasPrefix(variable, "OTEL_")
	}), env...)
	endWithParent(cmd)
	return cmd
}

// Serve runs a program that keeps running. The program listens on free ports.
func Serve(dir, program string, env ...string) *Process {
	GinkgoHelper()
	return Run(dir, program, nil, append([]string{"DIEHARD_API_AUTH=off", "DIEHARD_HTTP_DRAIN_DELAY=0s", "DIEHARD_HTTP_ADDR=127.0.0.1:0", "DIEHARD_ADMIN_ADDR=127.0.0.1:0"}, env...)...)
}

// AwaitReady waits until the program reports that it is ready.
func (p *Process) AwaitReady() {
	GinkgoHelper()
	Eventually(p.Ready, Patience).Should(Equal(http.StatusOK))
}

// Stop terminates the program and waits until it exits with 0.
func (p *Process) Stop() {
	GinkgoHelper()
	p.Signal(syscall.SIGTERM)
	p.Ended()
}

// Ended waits until the program exits with 0.
func (p *Process) Ended() {
	GinkgoHelper()
	p.EndsWith(0)
}

// EndsWith waits until the program ends with the exit code.
func (p *Process) EndsWith(code int) {
	GinkgoHelper()
	p.settled = true
	defer p.Session.Kill()
	Eventually(p.Session, Patience).Should(gexec.Exit(code))
}

// EndsWithAny waits until the program ends, with any exit code.
func (p *Process) EndsWithAny() {
	GinkgoHelper()
	p.settled = true
	defer p.Session.Kill()
	Eventually(p.Session, Patience).Should(gexec.Exit())
}

// Kill ends the program like a power cut and waits for its end.
func (p *Process) Kill() {
	GinkgoHelper()
	p.settled = true
	p.Session.Kill()
	Eventually(p.Session, Patience).Should(gexec.Exit())
}

// Log returns the log records so far. A record that was logged before a response may
// appear here after the response.
func (p *Process) Log() []map[string]any {
	GinkgoHelper()
	var records []map[string]any
	lines := bufio.NewScanner(bytes.NewReader(p.Err.Contents()))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var record map[string]any
		if json.Unmarshal(lines.Bytes(), &record) == nil { // the last line may be incomplete
			records = append(records, record)
		}
	}
	Expect(lines.Err()).NotTo(HaveOccurred())
	return records
}

// Messages returns the messages of the log records so far.
func (p *Process) Messages() []string {
	GinkgoHelper()
	var messages []string
	for _, record := range p.Log() {
		if message, ok := record["msg"].(string); ok {
			messages = append(messages, message)
		}
	}
	return messages
}

// URL returns the address of the program's API.
func (p *Process) URL() string {
	GinkgoHelper()
	return p.address("HTTP API listens")
}

// AdminURL returns the address of the program's admin port.
func (p *Process) AdminURL() string {
	GinkgoHelper()
	return p.address("admin port listens")
}

func (p *Process) address(message string) (url string) {
	GinkgoHelper()
	Eventually(func(g Gomega) {
		if code := p.ExitCode(); code != -1 {
			StopTrying(fmt.Sprintf("the program ended with exit code %d", code)).Now()
		}
		for _, record := range p.Log() {
			if address, ok := record["addr"].(string); ok && record["msg"] == message {
				url = "http://" + address
			}
		}
		g.Expect(url).NotTo(BeEmpty())
	}, Patience).Should(Succeed(), "no %q in the log", message)
	return url
}

// Ready returns the status of /readyz.
func (p *Process) Ready() (int, error) {
	if code := p.ExitCode(); code != -1 {
		return 0, StopTrying(fmt.Sprintf("the program ended with exit code %d", code))
	}
	response, err := http.Get(p.AdminURL() + "/readyz") //nolint:noctx // a local program
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	return response.StatusCode, nil
}

// Metric returns the value of a sample of /metrics. The argument is the sample's name
// with its labels, as /metrics shows them.
func (p *Process) Metric(sample string) (float64, error) {
	metrics, err := p.Metrics()
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(metrics) {
		if value, ok := strings.CutPrefix(line, sample+" "); ok {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, fmt.Errorf("/metrics has no %s", sample)
}

// Metrics returns the text of /metrics.
func (p *Process) Metrics() (string, error) {
	response, err := http.Get(p.AdminURL() + "/metrics") //nolint:noctx // a local program
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return string(text), err
}

// AwaitMetric waits until the sample of /metrics has the value. A relay counts
// a batch only after the commit that settles it.
func (p *Process) AwaitMetric(sample string, value float64) {
	GinkgoHelper()
	Eventually(p.Metric, Patience).WithArguments(sample).Should(Equal(value), sample)
}
