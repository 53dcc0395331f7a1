package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// program is a running program of Diehard with its default configuration,
// except for addresses.
type program struct {
	cmd   *exec.Cmd
	http  string // host:port of the API
	admin string
	ended chan error
}

const startTime = 30 * time.Second

// startProgram starts a program and waits until it is ready.
func (d *database) startProgram(ctx context.Context, name string, env ...string) (*program, error) {
	p := &program{ended: make(chan error, 1)}
	p.cmd = exec.Command(filepath.Join(d.bench.programs, name)) //nolint:gosec,noctx // our own program; stop ends it
	p.cmd.Env = append(slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return strings.HasPrefix(variable, "DIEHARD_") || strings.HasPrefix(variable, "PG") || strings.HasPrefix(variable, "OTEL_")
	}), append([]string{
		"DIEHARD_POSTGRES_DSN=" + d.dsn, "DIEHARD_CLICKHOUSE_DSN=" + d.clickHouse, "DIEHARD_API_AUTH=off", "DIEHARD_HTTP_DRAIN_DELAY=0s",
		"DIEHARD_HTTP_ADDR=127.0.0.1:0", "DIEHARD_ADMIN_ADDR=127.0.0.1:0",
	}, env...)...)
	endWithParent(p.cmd)
	log, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	listening := make(chan struct{})
	go func() {
		p.read(log, name == "api", listening)
		p.ended <- p.cmd.Wait()
	}()
	select {
	case <-listening:
	case err := <-p.ended:
		return nil, fmt.Errorf("%s ended: %w", name, err)
	case <-ctx.Done():
		return nil, errors.Join(fmt.Errorf("start %s: %w", name, context.Cause(ctx)), p.stop())
	}
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.admin+"/readyz", http.NoBody)
		if err != nil {
			return nil, errors.Join(err, p.stop())
		}
		response, err := http.DefaultClient.Do(request)
		if err == nil {
			_ = response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return p, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("wait until %s is ready: %w", name, context.Cause(ctx)), p.stop())
		case <-time.After(pollInterval):
		}
	}
}

// read finds the addresses in the log, and discards the rest.
func (p *program) read(log io.Reader, isAPI bool, listening chan<- struct{}) {
	lines := bufio.NewReader(log)
	for p.admin == "" || isAPI && p.http == "" {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var record struct {
			Msg  string `json:"msg"`
			Addr string `json:"addr"`
		}
		if json.Unmarshal(line, &record) != nil {
			continue
		}
		switch record.Msg {
		case "admin port listens":
			p.admin = record.Addr
		case "HTTP API listens":
			p.http = record.Addr
		}
	}
	close(listening)
	_, _ = io.Copy(io.Discard, lines)
}

// stop terminates the program and returns when it has ended.
func (p *program) stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	if err := <-p.ended; err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(p.cmd.Path), err)
	}
	return nil
}

// metric returns the value of a sample of /metrics, or 0 if it is missing. The argument
// is the sample's name with its labels, as /metrics shows them.
func (p *program) metric(sample string) (float64, error) {
	response, err := http.Get("http://" + p.admin + "/metrics") //nolint:noctx // a local program
	if err != nil {
		return 0, fmt.Errorf("read the metrics: %w", err)
	}
	defer response.Body.Close()
	lines := bufio.NewScanner(response.Body)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), sample+" "); ok {
			return strconv.ParseFloat(value, 64) //nolint:wrapcheck // the error names the text
		}
	}
	return 0, lines.Err() //nolint:wrapcheck // a local program
}
