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

// ClickHouseOptions describe a server. The zero value is one on free ports,
// whose data go when it stops.
type ClickHouseOptions struct {
	DataDir              string    // made if it is not there; "" is a temporary folder that Stop removes
	HTTPPort, NativePort int       // on 127.0.0.1; 0 is a free one
	User, Password       string    // what clients must send; "" is the user default, and no password
	Env                  []string  // further variables of the server's process, NAME=VALUE
	Log                  io.Writer // the server's log; nil keeps only the end, for the error of a failed start
}

// ClickHouse is the ClickHouse engine in a process of its own, behind
// ClickHouse's HTTP and native protocols. Its methods are safe for concurrent
// use.
type ClickHouse struct {
	server

	options ClickHouseOptions
	ready   ClickHouseReady
}

// ClickHouseReady is what `devstack clickhouse-engine` prints, as a line of JSON, once
// it answers.
type ClickHouseReady struct {
	HTTPAddr   string `json:"http_addr"`
	NativeAddr string `json:"native_addr"`
}

// ClickHousePasswordEnv tells the devstack program the password, which would
// show in the list of processes as an argument.
const ClickHousePasswordEnv = "DIEHARD_DEVSTACK_CLICKHOUSE_PASSWORD"

// StartClickHouse starts a server and returns when it answers; ctx bounds the
// start, and not the server's life. The server ends when this process does,
// however it ends. It is an error if another process uses the data folder, or if
// a chosen port is taken.
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

// Start starts the server again after Kill, after Stop if its folder is not a
// temporary one, or after it ended by itself: on the same data and the same
// ports.
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
			continue // the server finds one itself
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
		StopSignal: c.farewell(), Grace: stopPatience,
	}, said); err != nil {
		return err
	}
	select {
	case line := <-said.line:
		var ready ClickHouseReady
		if err := json.Unmarshal(line, &ready); err != nil {
			c.process().End(0)
			return fmt.Errorf("read its addresses from %q: %w", line, err)
		}
		if c.ready != ready { // the first time; who has the addresses may be reading them
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

// diagnose is the error of a process that has ended: its own last line.
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
	line chan []byte // holds one
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

// ClickHouseLibrary is the path of the engine, which is fetched if need be;
// progress is told about a download.
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

// NativeDSN is the address of a database over the native protocol, for
// clickhouse-go.
func (c *ClickHouse) NativeDSN(database string) string {
	return c.dsn("clickhouse", c.ready.NativeAddr, database)
}

// HTTPDSN is the address of a database over HTTP, for clickhouse-go.
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

// CreateDatabase makes an empty database. It is an error if there is one of that
// name.
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

// farewell is the signal for a server whose parent has gone.
func (c *ClickHouse) farewell() syscall.Signal {
	if c.options.DataDir == "" {
		return syscall.SIGKILL // nobody will read these data
	}
	return syscall.SIGTERM
}

// Kill ends the engine with SIGKILL. The data stay; Start finds all that was
// acknowledged.
func (c *ClickHouse) Kill() error {
	c.kill(syscall.SIGKILL)
	return nil
}

// Stop ends the server, cleanly if its data are kept, and removes a temporary
// folder. Stopping again does nothing.
func (c *ClickHouse) Stop() error {
	c.stop(c.farewell())
	return nil
}
