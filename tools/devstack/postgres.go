package devstack

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/lib/pq"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/engines"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/supervisor"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/tail"
)

const (
	postgresUser = "diehard"

	readyPoll = 20 * time.Millisecond

	// crashPatience limits the wait for processes of a crashed server. These processes
	// hold shared memory. The next server cannot start before they have ended.
	crashPatience = 15 * time.Second
)

// PostgresOptions describes a server. The zero value is a fast server for tests on a free
// port. Its data are removed when it stops.
type PostgresOptions struct {
	DataDir  string            // created if missing; "" is a temporary folder that Stop removes
	Port     int               // on 127.0.0.1; 0 picks a free port
	Durable  bool              // keeps committed data even if the machine crashes; if false, the server is faster, and its data survive only a crash of the server
	Settings map[string]string // additional settings, by their names in postgresql.conf
	Env      []string          // additional environment variables of the server, NAME=VALUE
	Log      io.Writer         // receives the server's log; if nil, the last lines are kept for the error of a failed start
}

// Postgres is a private PostgreSQL server. Its methods are safe for concurrent
// use.
type Postgres struct {
	server

	options  PostgresOptions
	bin      string
	user     *supervisor.User // nil is the caller's user
	password string
	port     int
}

// StartPostgres starts a server and returns when it accepts connections. The
// context limits the start only. The server ends when this process ends, even
// after a crash. It returns an error if another server uses the data folder, or
// if the chosen port is taken.
//
// If the caller is root, the server runs as the owner of the data folder. If
// the folder is new, it runs as nobody.
func StartPostgres(ctx context.Context, o PostgresOptions) (*Postgres, error) {
	p := &Postgres{server: server{keep: o.DataDir, out: o.Log}, options: o, port: o.Port}
	if err := p.start(ctx); err != nil {
		_ = p.Stop()
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	return p, nil
}

// Start restarts the server on the same data and the same port: after Kill,
// after the process ended by itself, or after Stop if the data folder is not
// temporary.
func (p *Postgres) Start(ctx context.Context) error {
	if err := p.start(ctx); err != nil {
		return fmt.Errorf("start PostgreSQL again: %w", err)
	}
	return nil
}

func (p *Postgres) start(ctx context.Context) error {
	p.life.Lock()
	defer p.life.Unlock()
	first, err := p.prepare("postgres")
	if err != nil {
		return err
	}
	if first {
		if err := p.open(ctx); err != nil {
			return err
		}
	}
	if err := clearStaleLock(ctx, p.dataDir); err != nil {
		return err
	}

	deadline := time.Now().Add(crashPatience)
	chosen := p.port != 0
	for try := 1; ; try++ {
		if !chosen {
			port, err := p.reserve(ctx)
			if err != nil {
				return err
			}
			p.port = port
		}
		err := p.launch(ctx)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errPortTaken) && !chosen && try < portTries:
		case errors.Is(err, errStillInUse) && time.Now().Before(deadline):
			if err := sleep(ctx, 5*readyPoll); err != nil {
				return err
			}
		default:
			if !chosen {
				p.port = 0
			}
			return err
		}
	}
}

// open finds the programs and the data folder, and creates the folder if it is
// missing.
func (p *Postgres) open(ctx context.Context) error {
	var err error
	if p.bin, err = postgresBin(ctx); err != nil {
		return err
	}
	if p.user, err = serverUser(p.dataDir); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(p.dataDir, "PG_VERSION")); errors.Is(err, os.ErrNotExist) {
		if err := p.initialize(ctx); err != nil {
			return fmt.Errorf("create the data folder %s: %w", p.dataDir, err)
		}
	}
	password, err := os.ReadFile(filepath.Join(p.dataDir, passwordFile))
	if err != nil {
		return fmt.Errorf("read the password of the data folder: %w", err)
	}
	if p.password == "" { // only at the first start, because callers may read the DSN concurrently
		p.password = strings.TrimSpace(string(password))
	}
	return nil
}

// passwordFile is the file in the data folder that holds the password of the user
// diehard. Each folder has its own password. So other users of the machine cannot connect,
// and a program cannot mistake another server for this server.
const passwordFile = "diehard.password"

// initialize creates the data folder in one step. If it was interrupted, the next call
// starts from the beginning.
func (p *Postgres) initialize(ctx context.Context) error {
	staging := p.dataDir + ".init"
	if err := os.RemoveAll(staging); err != nil {
		return err //nolint:wrapcheck // the error names the folder
	}
	if err := os.MkdirAll(staging, 0o700); err != nil {
		return err //nolint:wrapcheck // the error names the folder
	}
	defer func() { _ = os.RemoveAll(staging) }()

	secret := make([]byte, 16)
	_, _ = rand.Read(secret) // never fails
	pwfile := staging + ".password"
	defer func() { _ = os.Remove(pwfile) }()
	if err := os.WriteFile(pwfile, []byte(hex.EncodeToString(secret)+"\n"), 0o600); err != nil {
		return err //nolint:wrapcheck // the error names the file
	}
	if p.user != nil {
		for _, path := range []string{staging, pwfile} {
			if err := os.Chown(path, int(p.user.UID), int(p.user.GID)); err != nil {
				return err //nolint:wrapcheck // the error names the file
			}
		}
	}

	version, err := postgresVersion(ctx, p.bin)
	if err != nil {
		return err
	}
	args := []string{
		"--pgdata", p.dataArg(staging),
		"--username", postgresUser,
		// The password arrives over standard input, because the server's user
		// may not be able to reach a file below the caller's folders.
		"--pwfile", "/dev/stdin",
		"--auth-local", "trust", // the socket is in the data folder, which only its owner can open
		// The password is sent in clear text, but never leaves the machine.
		// Hashing with scram-sha-256 would cost milliseconds for each
		// connection.
		"--auth-host", "password",
		"--encoding", "UTF8",
		"--lc-messages", "C",
		"--no-instructions",
	}
	if version >= builtinLocaleVersion {
		// Sort order and case rules are the same everywhere, independent of the
		// system's locales.
		args = append(args, "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8", "--locale", "C")
	} else {
		args = append(args, "--locale", systemLocale)
	}
	if !p.options.Durable {
		args = append(args, "--no-sync")
	}
	var log tail.Buffer
	process, err := p.supervisor.Run(supervisor.Command{
		Path: filepath.Join(p.bin, "initdb"), Args: args, Env: postgresEnv(),
		Dir: staging, Stdin: pwfile, User: p.user,
		StopSignal: syscall.SIGTERM, Grace: killPatience,
	}, supervisor.Output{Stdout: &log, Stderr: &log})
	if err != nil {
		return err
	}
	if err := process.Wait(ctx); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, strings.Join(log.Lines(5), "\n"))
	}
	if err := os.Rename(pwfile, filepath.Join(staging, passwordFile)); err != nil {
		return err //nolint:wrapcheck // the error names the files
	}
	return os.Rename(staging, p.dataDir) //nolint:wrapcheck // the error names the folders
}

var (
	errPortTaken  = errors.New("the port is taken")
	errStillInUse = errors.New("processes of the killed server are still running")
)

// launch starts the server's process and waits until it accepts connections.
func (p *Postgres) launch(ctx context.Context) error {
	settings := map[string]string{
		"listen_addresses": loopback,
		"port":             strconv.Itoa(p.port),
		// The socket is in the data folder, which other users cannot open. The
		// path is relative because a socket's address has a maximum length.
		"unix_socket_directories": ".",
		"max_connections":         "300",
		"log_line_prefix":         "%m [%p] %d ",
	}
	if !p.options.Durable {
		// synchronous_commit stays on: without it, Kill would lose commits.
		// With fsync off it costs almost nothing.
		maps.Copy(settings, map[string]string{"fsync": "off", "full_page_writes": "off"})
	}
	maps.Copy(settings, p.options.Settings)
	args := make([]string, 0, 2+2*len(settings))
	args = append(args, "-D", p.dataArg(p.dataDir))
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}

	if err := p.run(supervisor.Command{
		Path: filepath.Join(p.bin, "postgres"), Args: args, Env: append(postgresEnv(), p.options.Env...),
		Dir: p.dataDir, User: p.user,
		StopSignal: p.orphanSignal(), Grace: stopPatience,
	}, nil); err != nil {
		return err
	}
	if err := p.waitReady(ctx); err != nil {
		p.process().End(killPatience, immediateShutdown)
		return err
	}
	return nil
}

// orphanSignal returns the signal that the server gets when its parent has
// ended.
func (p *Postgres) orphanSignal() syscall.Signal {
	if p.options.DataDir == "" {
		return immediateShutdown // the data are temporary
	}
	return fastShutdown
}

func (p *Postgres) waitReady(ctx context.Context) error {
	// The server may have failed because another program uses its port. That program
	// may accept the connection and never respond.
	connector, err := pq.NewConnector(p.DSN("postgres") + "&connect_timeout=2")
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	db := sql.OpenDB(connector)
	defer func() { _ = db.Close() }()
	for {
		// The ping sends a query, because a starting server, or another program
		// on the port, may only accept the connection.
		err := db.PingContext(ctx)
		if err == nil {
			return nil
		}
		timer := time.NewTimer(readyPoll)
		select {
		case <-timer.C:
		case <-p.process().Done():
			timer.Stop()
			return p.diagnose()
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("not ready: %w (%w)", context.Cause(ctx), err)
		}
	}
}

var lockOwner = regexp.MustCompile(`Is another \w+ \(PID (\d+)\) running`)

// diagnose finds the reason of a failed start in the log and returns it.
func (p *Postgres) diagnose() error {
	log := p.log.String()
	switch {
	case strings.Contains(log, `lock file "postmaster.pid" already exists`):
		if owner := lockOwner.FindStringSubmatch(log); owner != nil {
			return fmt.Errorf("the data folder %s is in use by the server with process id %s", p.dataDir, owner[1])
		}
		return fmt.Errorf("the data folder %s is in use by another server", p.dataDir)
	case strings.Contains(log, "pre-existing shared memory block"):
		return errStillInUse
	case strings.Contains(log, "Address already in use"):
		return fmt.Errorf("%w: %s", errPortTaken, net.JoinHostPort(loopback, strconv.Itoa(p.port)))
	}
	return fmt.Errorf("%w; last lines of its log:\n%s", p.process().Err(), strings.Join(p.log.Lines(10), "\n"))
}

// DSN returns the address of a database, in the form for lib/pq, pgx and psql.
func (p *Postgres) DSN(database string) string {
	address := url.URL{
		Scheme: "postgres", User: url.UserPassword(postgresUser, p.password),
		Host: net.JoinHostPort(loopback, strconv.Itoa(p.port)), Path: "/" + database,
		RawQuery: "sslmode=disable",
	}
	return address.String()
}

// CreateDatabase creates an empty database and returns its DSN. It returns an
// error if the name is taken.
func (p *Postgres) CreateDatabase(ctx context.Context, name string) (dsn string, err error) {
	connector, err := pq.NewConnector(p.DSN("postgres"))
	if err != nil {
		return "", fmt.Errorf("create database %s: %w", name, err)
	}
	db := sql.OpenDB(connector)
	defer func() { _ = db.Close() }()
	if _, err := db.ExecContext(ctx, "CREATE DATABASE "+pq.QuoteIdentifier(name)); err != nil {
		return "", fmt.Errorf("create database %s: %w", name, err)
	}
	return p.DSN(name), nil
}

// Kill ends the server like a crash: it cuts all connections and writes no
// checkpoint. The data stay, and Start recovers them.
func (p *Postgres) Kill() error {
	p.kill(immediateShutdown)
	return nil
}

// Stop shuts the server down and removes a temporary folder. The shutdown is
// clean if the data are kept. A second call does nothing.
func (p *Postgres) Stop() error {
	p.stop(p.orphanSignal(), immediateShutdown)
	return nil
}

// clearStaleLock removes the lock file of a crashed server if its process id
// now belongs to another program. PostgreSQL itself checks only whether a
// process with this id exists. In containers the system soon assigns the same
// ids again.
func clearStaleLock(ctx context.Context, dataDir string) error {
	path := filepath.Join(dataDir, "postmaster.pid")
	content, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err //nolint:wrapcheck // the error names the file
	}
	first, _, _ := strings.Cut(string(content), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil || processName(ctx, pid) == "postgres" {
		return nil //nolint:nilerr // the server reports the error better
	}
	if err := os.Remove(path); err != nil {
		return err //nolint:wrapcheck // the error names the file
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx) //nolint:wrapcheck // the caller's own error
	}
}

// postgresEnv returns this process's environment without the variables that configure a
// server or translate its messages. The function diagnose needs English messages.
func postgresEnv() []string {
	env := slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return strings.HasPrefix(variable, "PG") || strings.HasPrefix(variable, "LC_") ||
			strings.HasPrefix(variable, "LANG=") || strings.HasPrefix(variable, "LANGUAGE=")
	})
	return append(env, "LC_ALL=C")
}

// postgresBin returns the folder of the server's programs.
func postgresBin(ctx context.Context) (string, error) {
	if dir := os.Getenv(engines.PostgresBinEnv); dir != "" {
		version, err := postgresVersion(ctx, dir)
		if err != nil {
			return "", fmt.Errorf("%s: %w", engines.PostgresBinEnv, err)
		}
		if version < oldestVersion {
			return "", fmt.Errorf("%s: %s has PostgreSQL %d, but version %d or newer is required", engines.PostgresBinEnv, dir, version, oldestVersion)
		}
		return dir, nil
	}
	fetched, err := engines.Fetch(ctx, engines.Options{Progress: os.Stderr})
	if err != nil {
		return "", err
	}
	return fetched.PostgresBin(ctx)
}
