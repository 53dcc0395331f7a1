// Package stack runs a complete Diehard on one machine. The parts of a stack are the two
// databases, the API and the relay.
package stack

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/tools/devstack"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/filelock"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/tail"
)

// databaseName is the name of the database in PostgreSQL and ClickHouse, and of
// the user in both.
const databaseName = "diehard"

// Options configures a stack's folders, addresses and output.
type Options struct {
	Dir string // data, logs and the state file
	Bin string // the folder with the programs api and relay

	// Port 0 picks a free port.
	PostgresPort         int
	ClickHouseHTTPPort   int
	ClickHouseNativePort int

	APIAddr        string // host:port
	APIAdminAddr   string
	RelayAdminAddr string

	Out  io.Writer // receives progress messages; nil writes nothing
	Logs Logs      // receive the programs' logs

	// When Hurry is closed, Stop kills the processes instead of waiting for them.
	Hurry <-chan struct{}
}

// Logs returns the writer for a program's log.
type Logs func(name string) io.Writer

// ErrUp reports that a stack already runs in the folder.
var ErrUp = errors.New("a stack is already running")

// Stack is a running stack.
type Stack struct {
	options    Options
	state      State
	postgres   *devstack.Postgres
	clickhouse *devstack.ClickHouse
	programs   []*program // in start order
	closers    []func()
	ended      chan ended
}

// ended is a part that ended unexpectedly.
type ended struct {
	name string
	err  error
	tail []string
}

// Start starts everything and returns when the API and the relay are ready. If
// a part fails or ctx ends first, it stops all started parts.
func Start(ctx context.Context, o Options) (*Stack, error) {
	s := &Stack{options: o, ended: make(chan ended, 4)}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// If a part ends while another part starts, canceling ctx ends the start.
	started := make(chan struct{})
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		select {
		case e := <-s.ended:
			cancel(e.Err())
		case <-started:
		}
	}()
	err := s.start(ctx)
	close(started)
	<-watching
	if cause := context.Cause(ctx); cause != nil {
		err = cause // the first error, which caused err
	}
	if err != nil {
		s.Stop()
		return nil, err
	}
	return s, nil
}

func (s *Stack) start(ctx context.Context) error {
	if err := s.occupy(); err != nil {
		return err
	}
	if err := s.checkPrograms(); err != nil {
		return err
	}
	if err := s.chooseAddresses(ctx); err != nil {
		return err
	}
	if err := s.startPostgres(ctx); err != nil {
		return err
	}
	if err := s.startClickHouse(ctx); err != nil {
		return err
	}
	if err := s.startPrograms(ctx); err != nil {
		return err
	}
	return s.writeState()
}

// occupy claims the folder for this stack.
func (s *Stack) occupy() error {
	dir, err := filepath.Abs(s.options.Dir)
	if err != nil {
		return err //nolint:wrapcheck // the error names the operation
	}
	s.options.Dir = dir
	if err := os.MkdirAll(filepath.Join(dir, "logs"), 0o755); err != nil { //nolint:gosec // secret files in it have their own mode
		return err //nolint:wrapcheck // the error names the folder
	}
	unlock, err := filelock.TryLock(filepath.Join(dir, "lock"))
	if errors.Is(err, filelock.ErrHeld) {
		if state, err := ReadState(dir); err == nil {
			return fmt.Errorf("%w in %s: process %d, API at %s", ErrUp, dir, state.PID, state.APIURL)
		}
		return fmt.Errorf("%w in %s", ErrUp, dir)
	}
	if err != nil {
		return err
	}
	s.closers = append(s.closers, unlock)
	return removeState(dir) // left by a killed stack
}

func (s *Stack) checkPrograms() error {
	for _, name := range []string{"api", "relay"} {
		if _, err := os.Stat(filepath.Join(s.options.Bin, name)); err != nil {
			return fmt.Errorf("%w (make build)", err)
		}
	}
	return nil
}

// chooseAddresses replaces port 0 by a free port. It returns an error that names all
// ports that are in use, before anything is started.
func (s *Stack) chooseAddresses(ctx context.Context) error {
	var taken []string
	check := func(what, setting, address string) string {
		listener, err := listen(ctx, address)
		if err != nil {
			if errors.Is(err, syscall.EADDRINUSE) {
				err = errors.New("the port is in use")
			}
			taken = append(taken, fmt.Sprintf("%s cannot listen on %s: %v; choose another with %s", what, address, err, setting))
			return address
		}
		defer func() { _ = listener.Close() }()
		return listener.Addr().String()
	}
	o := &s.options
	// The engines pick and keep free ports themselves. Another process could take a
	// port that is picked here before the engine listens.
	for _, engine := range []struct {
		what, setting string
		port          int
	}{
		{"PostgreSQL", "--postgres-port", o.PostgresPort},
		{"ClickHouse", "--clickhouse-http-port", o.ClickHouseHTTPPort},
		{"ClickHouse", "--clickhouse-native-port", o.ClickHouseNativePort},
	} {
		if engine.port != 0 {
			check(engine.what, engine.setting+" or "+Variable(engine.setting), net.JoinHostPort("127.0.0.1", strconv.Itoa(engine.port)))
		}
	}
	o.APIAddr = check("the API", "--http-addr or DIEHARD_HTTP_ADDR", o.APIAddr)
	o.APIAdminAddr = check("the API's admin port", "--api-admin-addr or "+Variable("--api-admin-addr"), o.APIAdminAddr)
	o.RelayAdminAddr = check("the relay's admin port", "--relay-admin-addr or "+Variable("--relay-admin-addr"), o.RelayAdminAddr)
	if len(taken) > 0 {
		return errors.New(strings.Join(taken, "\n"))
	}
	return nil
}

// listen listens on address. Instead of port 0 it picks a free port below the range from
// which the system assigns ports. So no other process gets this port by chance before the
// program listens.
func listen(ctx context.Context, address string) (net.Listener, error) {
	var config net.ListenConfig
	host, port, err := net.SplitHostPort(address)
	if err != nil || port != "0" {
		return config.Listen(ctx, "tcp", address) //nolint:wrapcheck // the error names the address
	}
	const (
		lowest, ports = 20_000, 10_000
		tries         = 100
	)
	for range tries {
		port := lowest + mathrand.IntN(ports) //nolint:gosec // not a secret
		if listener, err := config.Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port))); err == nil {
			return listener, nil
		}
	}
	return config.Listen(ctx, "tcp", address) //nolint:wrapcheck // the error names the address
}

// Variable returns the environment variable that sets a flag of `devstack up`.
func Variable(flag string) string {
	return "DIEHARD_DEVSTACK_" + strings.ToUpper(strings.ReplaceAll(strings.TrimPrefix(flag, "--"), "-", "_"))
}

// sayf writes a progress message.
func (s *Stack) sayf(format string, args ...any) {
	if s.options.Out != nil {
		_, _ = fmt.Fprintf(s.options.Out, format+"\n", args...)
	}
}

func (s *Stack) startPostgres(ctx context.Context) error {
	log, end, err := s.engineLog("postgres")
	if err != nil {
		return err
	}
	began := time.Now()
	p, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{
		DataDir: filepath.Join(s.options.Dir, "postgres"), Port: s.options.PostgresPort, Durable: true, Log: log,
	})
	if err != nil {
		return err
	}
	s.postgres = p
	s.watch("PostgreSQL", p.Done(), func() error { return errors.New("its process ended") }, end)
	if _, err := p.CreateDatabase(ctx, databaseName); err != nil && !isPostgresCode(err, "42P04") { // duplicate_database
		return err
	}
	s.state.PostgresDSN = p.DSN(databaseName)
	s.state.PostgresPID = p.PID()
	s.sayf("PostgreSQL is up (%s)", since(began))
	return nil
}

func (s *Stack) startClickHouse(ctx context.Context) error {
	log, end, err := s.engineLog("clickhouse")
	if err != nil {
		return err
	}
	password, err := s.clickHousePassword()
	if err != nil {
		return err
	}
	began := time.Now()
	c, err := devstack.StartClickHouse(ctx, devstack.ClickHouseOptions{
		DataDir:  filepath.Join(s.options.Dir, "clickhouse"),
		HTTPPort: s.options.ClickHouseHTTPPort, NativePort: s.options.ClickHouseNativePort,
		User: databaseName, Password: password, Log: log,
	})
	if err != nil {
		return err
	}
	s.clickhouse = c
	s.watch("ClickHouse", c.Done(), func() error { return errors.New("its process ended") }, end)
	if err := c.CreateDatabase(ctx, databaseName); err != nil && !isClickHouseCode(err, 82) { // DATABASE_ALREADY_EXISTS
		return err
	}
	s.state.ClickHouseDSN = c.NativeDSN(databaseName)
	s.state.ClickHouseHTTPDSN = c.HTTPDSN(databaseName)
	s.state.ClickHousePID = c.PID()
	s.sayf("ClickHouse is up (%s)", since(began))
	return nil
}

// clickHousePassword returns the password of this folder. ClickHouse needs a password,
// because a client can read and write the host's files through the engine, and a web page
// can send requests to any local port.
func (s *Stack) clickHousePassword() (string, error) {
	path := filepath.Join(s.options.Dir, "clickhouse.password")
	content, err := os.ReadFile(path)
	if err == nil {
		return strings.TrimSpace(string(content)), nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return "", err //nolint:wrapcheck // the error names the file
	}
	secret := make([]byte, 8)
	_, _ = rand.Read(secret) // never fails
	password := hex.EncodeToString(secret)
	return password, os.WriteFile(path, []byte(password+"\n"), 0o600) //nolint:wrapcheck // the error names the file
}

// engineLog returns a new file for the log of an engine, and a buffer that
// keeps the end of the log.
func (s *Stack) engineLog(name string) (io.Writer, *tail.Buffer, error) {
	file, err := os.Create(filepath.Join(s.options.Dir, "logs", name+".log"))
	if err != nil {
		return nil, nil, err //nolint:wrapcheck // the error names the file
	}
	s.closers = append(s.closers, func() { _ = file.Close() })
	end := &tail.Buffer{}
	return io.MultiWriter(file, end), end, nil
}

func (s *Stack) startPrograms(ctx context.Context) error {
	began := time.Now()
	// The relay migrates ClickHouse and the outbox. The API migrates its own tables.
	for _, binary := range []string{"relay", "api"} {
		if err := s.runToEnd(ctx, "migrate", binary, []string{"migrate"}, s.environment("")); err != nil {
			return err
		}
	}
	s.sayf("The databases are migrated (%s)", since(began))

	began = time.Now()
	api, err := s.launch("api", "serve", s.environment(s.options.APIAdminAddr))
	if err != nil {
		return err
	}
	relay, err := s.launch("relay", "run", s.environment(s.options.RelayAdminAddr))
	if err != nil {
		return err
	}
	s.state.PID = os.Getpid()
	s.state.EventTable = eventTable()
	s.state.APIPID, s.state.RelayPID = api.process.PID(), relay.process.PID()
	s.state.APIURL = "http://" + s.options.APIAddr
	s.state.APIAdminURL = "http://" + s.options.APIAdminAddr
	s.state.RelayAdminURL = "http://" + s.options.RelayAdminAddr
	for _, ready := range []struct {
		program *program
		url     string
	}{{api, s.state.APIAdminURL}, {relay, s.state.RelayAdminURL}} {
		if err := ready.program.waitReady(ctx, ready.url); err != nil {
			return err
		}
	}
	s.sayf("The API and the relay are ready (%s)", since(began))
	return nil
}

// environment returns the programs' environment: the caller's DIEHARD_
// variables, overridden by the addresses of the databases.
func (s *Stack) environment(adminAddr string) []string {
	env := slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return strings.HasPrefix(variable, "DIEHARD_DEVSTACK_") || strings.HasPrefix(variable, "DIEHARD_DEV_")
	})
	if os.Getenv("DIEHARD_LOG_FORMAT") == "" {
		env = append(env, "DIEHARD_LOG_FORMAT=text")
	}
	if os.Getenv("DIEHARD_API_KEYS") == "" && os.Getenv("DIEHARD_API_AUTH") == "" {
		env = append(env, "DIEHARD_API_AUTH=off")
	}
	if os.Getenv("DIEHARD_HTTP_DRAIN_DELAY") == "" {
		env = append(env, "DIEHARD_HTTP_DRAIN_DELAY=0s") // no load balancer
	}
	env = append(
		env,
		"DIEHARD_POSTGRES_DSN="+s.state.PostgresDSN,
		"DIEHARD_CLICKHOUSE_DSN="+s.state.ClickHouseDSN,
		"DIEHARD_HTTP_ADDR="+s.options.APIAddr,
	)
	if adminAddr != "" {
		env = append(env, "DIEHARD_ADMIN_ADDR="+adminAddr)
	}
	return env
}

// watch reports if the part ends unexpectedly.
func (s *Stack) watch(name string, done <-chan struct{}, err func() error, log *tail.Buffer) {
	go func() {
		<-done
		const lines = 10
		select {
		case s.ended <- ended{name: name, err: err(), tail: log.Lines(lines)}:
		default: // the stack is stopping
		}
	}()
}

// Err returns an error with the name of the part and the end of its log.
func (e ended) Err() error {
	text := "its log is empty"
	if len(e.tail) > 0 {
		text = "last lines of its log:\n  " + strings.Join(e.tail, "\n  ")
	}
	return fmt.Errorf("%s ended unexpectedly: %w; %s", e.name, e.err, text)
}

// Wait waits until ctx ends, and then returns nil. It returns an error if a
// part ends unexpectedly.
func (s *Stack) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case e := <-s.ended:
		return e.Err()
	}
}

// State returns the addresses of the parts.
func (s *Stack) State() State { return s.state }

// Stop stops everything: first the programs, then the databases.
func (s *Stack) Stop() {
	if len(s.closers) > 0 {
		_ = removeState(s.options.Dir)
	}
	for _, p := range slices.Backward(s.programs) {
		p.stop(s.options.Hurry)
	}
	// A server's Stop cannot be shortened, but Kill ends the server during Stop.
	var engines sync.WaitGroup
	finished := make(chan struct{})
	engines.Go(func() {
		select {
		case <-s.options.Hurry:
			if s.clickhouse != nil {
				_ = s.clickhouse.Kill()
			}
			if s.postgres != nil {
				_ = s.postgres.Kill()
			}
		case <-finished:
		}
	})
	if s.clickhouse != nil {
		_ = s.clickhouse.Stop()
	}
	if s.postgres != nil {
		_ = s.postgres.Stop()
	}
	close(finished)
	engines.Wait()
	for _, c := range slices.Backward(s.closers) {
		c()
	}
	s.closers = nil
}

func since(t time.Time) string { return time.Since(t).Round(10 * time.Millisecond).String() }

func isPostgresCode(err error, code string) bool {
	e, ok := errors.AsType[*pq.Error](err)
	return ok && string(e.Code) == code
}

func isClickHouseCode(err error, code int32) bool {
	e, ok := errors.AsType[*clickhouse.Exception](err)
	return ok && e.Code == code
}
