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

	"github.com/diehard-outbox/diehard/internal/testengines"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gexec"
)

// Patience is how long a program may take to start or to end.
const Patience = time.Minute

// Race is the flag of go build that gives a program the race detector, if the
// suite has it.
func Race() string {
	info, ok := debug.ReadBuildInfo()
	race := ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
	return fmt.Sprint("-race=", race)
}

// Build returns a function that builds api and relay, with flags of go build,
// into a temporary folder that goes with the suite, and returns the folder.
func Build(flags ...string) func(ctx context.Context) string {
	return func(ctx context.Context) string {
		GinkgoHelper()
		dir, err := os.MkdirTemp("", "diehard-programs-*")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(os.RemoveAll, dir)
		args := append([]string{"build", "-buildvcs=false", "-o", dir}, flags...)
		cmd := exec.CommandContext(ctx, "go", append(args, "./cmd/api", "./cmd/relay")...) //nolint:gosec // a folder and flags of ours
		// In the product's module: with the versions that are shipped.
		cmd.Dir, err = testengines.Repository()
		Expect(err).NotTo(HaveOccurred())
		output, err := cmd.CombinedOutput()
		Expect(err).NotTo(HaveOccurred(), "%s", output)
		return dir
	}
}

// Process is a program that runs. It is stopped with the spec, and must end
// well unless the spec says otherwise.
type Process struct {
	*gexec.Session

	settled bool // its end was looked at
}

// Run runs a program of the folder with these variables, NAME=VALUE, and none
// of Diehard's that the suite itself was started with.
func Run(dir, program string, args []string, env ...string) *Process {
	GinkgoHelper()
	return RunOn(nil, dir, program, args, env...)
}

// RunOn is Run with a standard input.
func RunOn(stdin io.Reader, dir, program string, args []string, env ...string) *Process {
	GinkgoHelper()
	cmd := exec.Command(filepath.Join(dir, program), args...) //nolint:gosec,noctx // what the suite has built; it ends with the spec
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return strings.HasPrefix(variable, "DIEHARD_") || strings.HasPrefix(variable, "PG") || strings.HasPrefix(variable, "SENTRY_")
	}), env...)
	cmd.Stdin = stdin
	endWithParent(cmd)
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

// Serve runs a program that stays. It listens on free ports.
func Serve(dir, program string, env ...string) *Process {
	GinkgoHelper()
	return Run(dir, program, nil, append([]string{"DIEHARD_API_AUTH=off", "DIEHARD_HTTP_ADDR=127.0.0.1:0", "DIEHARD_ADMIN_ADDR=127.0.0.1:0"}, env...)...)
}

// AwaitReady waits until the program says that it is ready.
func (p *Process) AwaitReady() {
	GinkgoHelper()
	Eventually(p.Ready, Patience).Should(Equal(http.StatusOK))
}

// Stop asks the program to end and waits until it has, without an error.
func (p *Process) Stop() {
	GinkgoHelper()
	p.Signal(syscall.SIGTERM)
	p.Ended()
}

// Ended waits until the program has ended, without an error.
func (p *Process) Ended() {
	GinkgoHelper()
	p.EndsWith(0)
}

// EndsWith waits until the program has ended with that exit code.
func (p *Process) EndsWith(code int) {
	GinkgoHelper()
	p.settled = true
	defer p.Session.Kill()
	Eventually(p.Session, Patience).Should(gexec.Exit(code))
}

// Kill ends the program like a power cut and waits until it is gone.
func (p *Process) Kill() {
	GinkgoHelper()
	p.settled = true
	p.Session.Kill()
	Eventually(p.Session, Patience).Should(gexec.Exit())
}

// Log returns the records of the log that have arrived so far. What a program has
// logged before it answers may arrive after the answer.
func (p *Process) Log() []map[string]any {
	GinkgoHelper()
	var records []map[string]any
	lines := bufio.NewScanner(bytes.NewReader(p.Err.Contents()))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var record map[string]any
		if json.Unmarshal(lines.Bytes(), &record) == nil { // the last line may not be complete yet
			records = append(records, record)
		}
	}
	Expect(lines.Err()).NotTo(HaveOccurred())
	return records
}

// Messages returns the log's messages, as Log returns its records.
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

// URL is where the program serves the API.
func (p *Process) URL() string {
	GinkgoHelper()
	return p.address("HTTP API listens")
}

// AdminURL is where the program's admin port is.
func (p *Process) AdminURL() string {
	GinkgoHelper()
	return p.address("admin port listens")
}

func (p *Process) address(message string) (url string) {
	GinkgoHelper()
	Eventually(func(g Gomega) {
		if code := p.ExitCode(); code != -1 {
			StopTrying(fmt.Sprintf("the program has ended with %d", code)).Now()
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
		return 0, StopTrying(fmt.Sprintf("the program has ended with %d", code))
	}
	response, err := http.Get(p.AdminURL() + "/readyz") //nolint:noctx // of a local program
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	return response.StatusCode, nil
}

// Metric returns the value of a sample of /metrics: its name with its labels,
// as it is shown.
func (p *Process) Metric(sample string) (float64, error) {
	response, err := http.Get(p.AdminURL() + "/metrics") //nolint:noctx // of a local program
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), sample+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, fmt.Errorf("/metrics has no %s", sample)
}

// AwaitMetric waits until the sample of /metrics has the value. A relay counts a
// batch after the commit that takes it out of the outbox.
func (p *Process) AwaitMetric(sample string, value float64) {
	GinkgoHelper()
	Eventually(p.Metric, Patience).WithArguments(sample).Should(Equal(value), sample)
}
