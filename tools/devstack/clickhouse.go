package devstack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/ClickHouse/clickhouse-go/v2"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/engines"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/supervisor"
)

// ClickHouseOptions describes a server. The zero value is a server on free ports. Its
// data are removed when it stops.
type ClickHouseOptions struct {
	DataDir              string    // created if missing; "" is a temporary folder that Stop removes
	HTTPPort, NativePort int       // on 127.0.0.1; 0 picks a free port
	User, Password       string    // the credentials of clients; "" is the user default without a password
	Env                  []string  // additional environment variables of the server, NAME=VALUE
	Log                  io.Writer // receives the server's log; if nil, the last lines are kept for the error of a failed start
}

// ClickHouse is the ClickHouse engine in its own process. It serves
// ClickHouse's HTTP and native protocols. Its methods are safe for concurrent
// use.
type ClickHouse struct {
	server

	options ClickHouseOptions
	ready   ClickHouseReady
}

// ClickHouseReady is the JSON line that `devstack clickhouse-engine` prints
// when it accepts connections.
type ClickHouseReady struct {
	HTTPAddr   string `json:"http_addr"`
	NativeAddr string `json:"native_addr"`
}

// ClickHousePasswordEnv names the variable that passes the password to the
// devstack program. An argument would be visible in the list of processes.
const ClickHousePasswordEnv = "DIEHARD_DEVSTACK_CLICKHOUSE_PASSWORD"

// StartClickHouse starts a server and returns when it accepts connections. The
// context limits the start only. The server ends when this process ends, even
// after a crash. It returns an error if another process uses the data folder,
// or if a chosen port is taken.
func StartClickHouse(ctx context.Context, o ClickHouseOptions) (*ClickHouse, error) {
	c := &ClickHouse{
		server:  server{keep: o.DataDir, out: o.Log},
		options: o,
		ready:   ClickHouseReady{HTTPAddr: address(o.HTTPPort), NativeAddr: address(o.NativePort)},
	}
	if err := c.start(ctx); err != nil {
		_ = c.Stop()
		return nil, fmt.Errorf("start ClickHouse: %w", err)
	}
	return c, nil
}

func address(port int) string { return net.JoinHostPort(loopback, strconv.Itoa(port)) }

// Start restarts the server on the same data and the same ports: after Kill,
// after the process ended by itself, or after Stop if the data folder is not
// temporary.
func (c *ClickHouse) Start(ctx context.Context) error {
	if err := c.start(ctx); err != nil {
		return fmt.Errorf("start ClickHouse again: %w", err)
	}
	return nil
}

func (c *ClickHouse) start(ctx context.Context) error {
	c.life.Lock()
	defer c.life.Unlock()
	if _, err := c.prepare("clickhouse"); err != nil {
		return err
	}
	library, err := ClickHouseLibrary(ctx, os.Stderr)
	if err != nil {
		return err
	}
	path, err := program()
	if err != nil {
		return err
	}
	for _, addr := range []*string{&c.ready.HTTPAddr, &c.ready.NativeAddr} {
		if !reservesPorts || *addr != address(0) {
			continue // the server picks a free port
		}
		port, err := c.reserve(ctx)
		if err != nil {
			return err
		}
		*addr = address(port)
	}
	args := []string{
		"clickhouse-engine", "--library", library, "--data-dir", c.dataDir,
		"--http-addr", c.ready.HTTPAddr, "--native-addr", c.ready.NativeAddr,
	}
	if c.options.User != "" {
		args = append(args, "--user", c.options.User)
	}
	said := &firstLine{line: make(chan []byte, 1)}
	if err := c.run(supervisor.Command{
		Path: path, Args: args, Env: slices.Concat(os.Environ(), c.options.Env, []string{ClickHousePasswordEnv + "=" + c.options.Password}),
		StopSignal: c.orphanSignal(), Grace: stopPatience,
	}, said); err != nil {
		return err
	}
	select {
	case line := <-said.line:
		var ready ClickHouseReady
		if err := json.Unmarshal(line, &ready); err != nil {
			c.process().End(0)
			return fmt.Errorf("read the server's addresses from %q: %w", line, err)
		}
		if c.ready != ready { // only at the first start, because callers may read the addresses concurrently
			c.ready = ready
		}
		return nil
	case <-c.process().Done():
		return c.diagnose()
	case <-ctx.Done():
		c.process().End(0)
		return fmt.Errorf("not ready: %w", context.Cause(ctx))
	}
}

// diagnose returns the last line that the process wrote as an error.
func (c *ClickHouse) diagnose() error {
	lines := c.log.Lines(1)
	if len(lines) == 0 {
		return c.process().Err()
	}
	return errors.New(strings.TrimPrefix(lines[0], "devstack: "))
}

// firstLine keeps the first line written to it.
type firstLine struct {
	mu   sync.Mutex
	buf  []byte
	said bool
	line chan []byte // capacity 1
}

func (f *firstLine) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.said {
		return len(p), nil
	}
	f.buf = append(f.buf, p...)
	if line, _, ok := bytes.Cut(f.buf, []byte("\n")); ok {
		f.line <- line
		f.said = true
	}
	return len(p), nil
}

// ClickHouseLibrary returns the path of the engine. It downloads the engine if the cache
// lacks it, and reports the download to progress.
func ClickHouseLibrary(ctx context.Context, progress io.Writer) (string, error) {
	if path := os.Getenv(engines.ClickHouseLibEnv); path != "" {
		if _, err := os.Stat(path); err != nil { //nolint:gosec // the developer's own choice
			return "", fmt.Errorf("%s: %w", engines.ClickHouseLibEnv, err)
		}
		return path, nil
	}
	fetched, err := engines.Fetch(ctx, engines.Options{Progress: progress})
	if err != nil {
		return "", err
	}
	return fetched.ClickHouseLib()
}

// NativeDSN returns the address of a database over the native protocol, for
// clickhouse-go.
func (c *ClickHouse) NativeDSN(database string) string {
	return c.dsn("clickhouse", c.ready.NativeAddr, database)
}

// HTTPDSN returns the address of a database over HTTP, for clickhouse-go.
func (c *ClickHouse) HTTPDSN(database string) string {
	return c.dsn("http", c.ready.HTTPAddr, database)
}

func (c *ClickHouse) dsn(scheme, host, database string) string {
	dsn := url.URL{Scheme: scheme, Host: host, Path: "/" + database}
	switch {
	case c.options.Password != "":
		dsn.User = url.UserPassword(c.user(), c.options.Password)
	case c.options.User != "":
		dsn.User = url.User(c.options.User)
	}
	return dsn.String()
}

func (c *ClickHouse) user() string {
	if c.options.User == "" {
		return "default"
	}
	return c.options.User
}

// CreateDatabase creates an empty database. It returns an error if the name is
// taken.
func (c *ClickHouse) CreateDatabase(ctx context.Context, name string) error {
	options, err := clickhouse.ParseDSN(c.NativeDSN("default"))
	if err != nil {
		return fmt.Errorf("create database %s: %w", name, err)
	}
	conn, err := clickhouse.Open(options)
	if err != nil {
		return fmt.Errorf("create database %s: %w", name, err)
	}
	defer func() { _ = conn.Close() }()
	quoted := "`" + strings.NewReplacer(`\`, `\\`, "`", "\\`").Replace(name) + "`"
	if err := conn.Exec(ctx, "CREATE DATABASE "+quoted); err != nil {
		return fmt.Errorf("create database %s: %w", name, err)
	}
	return nil
}

// orphanSignal returns the signal that the server gets when its parent has
// ended.
func (c *ClickHouse) orphanSignal() syscall.Signal {
	if c.options.DataDir == "" {
		return syscall.SIGKILL // the data are temporary
	}
	return syscall.SIGTERM
}

// Kill ends the engine with SIGKILL. The data stay. After Start the server has
// all acknowledged rows.
func (c *ClickHouse) Kill() error {
	c.kill(syscall.SIGKILL)
	return nil
}

// Stop ends the server and removes a temporary folder. The shutdown is clean if
// the data are kept. A second call does nothing.
func (c *ClickHouse) Stop() error {
	c.stop(c.orphanSignal())
	return nil
}
