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

	// crashPatience is how long after a crash the processes of the earlier
	// server may hold on to its memory, which keeps the next from starting.
	crashPatience = 15 * time.Second
)

// PostgresOptions describe a server. The zero value is a fast one for tests on
// a free port, whose data go when it stops.
type PostgresOptions struct {
	DataDir  string            // made if it is not there; "" is a temporary folder that Stop removes
	Port     int               // on 127.0.0.1; 0 is a free one
	Durable  bool              // what is committed survives a crash of the machine, and not only of the server; off is faster
	Settings map[string]string // further server settings, by their names in postgresql.conf
	Env      []string          // further variables of the server's processes, NAME=VALUE
	Log      io.Writer         // the server's log; nil keeps only the end, for the error of a failed start
}

// Postgres is a private PostgreSQL server. Its methods are safe for concurrent
// use.
type Postgres struct {
	server

	options  PostgresOptions
	bin      string
	user     *supervisor.User // nil: the caller's own
	password string
	port     int
}

// StartPostgres starts a server and returns when it takes connections; ctx
// bounds the start, and not the server's life. The server ends when this process
// does, however it ends. It is an error if another server uses the data folder,
// or if the chosen port is taken.
//
// As root the server runs as the owner of the data folder, or as nobody if the
// folder is new.
func StartPostgres(ctx context.Context, o PostgresOptions) (*Postgres, error) {
	p := &Postgres{server: server{keep: o.DataDir, out: o.Log}, options: o, port: o.Port}
	if err := p.start(ctx); err != nil {
		_ = p.Stop()
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	return p, nil
}

// Start starts the server again after Kill, after Stop if its folder is not a
// temporary one, or after it ended by itself: on the same data and the same
// port.
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

// open finds the programs and the data folder, and makes the folder if it is
// not there.
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
			return fmt.Errorf("make the data folder %s: %w", p.dataDir, err)
		}
	}
	password, err := os.ReadFile(filepath.Join(p.dataDir, passwordFile))
	if err != nil {
		return fmt.Errorf("read the password of the data folder: %w", err)
	}
	if p.password == "" { // the first time; who has the DSN may be reading it
		p.password = strings.TrimSpace(string(password))
	}
	return nil
}

// passwordFile holds the password of the user diehard, in the data folder. Each
// folder has its own, so that other users of the machine cannot connect and we
// cannot mistake another server for ours.
const passwordFile = "diehard.password"

// initialize makes the data folder in one step: what is interrupted is made
// anew the next time.
func (p *Postgres) initialize(ctx context.Context) error {
	staging := p.dataDir + ".init"
	if err := os.RemoveAll(staging); err != nil {
		return err //nolint:wrapcheck // names the folder already
	}
	if err := os.MkdirAll(staging, 0o700); err != nil {
		return err //nolint:wrapcheck // names the folder already
	}
	defer func() { _ = os.RemoveAll(staging) }()

	secret := make([]byte, 16)
	_, _ = rand.Read(secret) // never fails
	pwfile := staging + ".password"
	defer func() { _ = os.Remove(pwfile) }()
	if err := os.WriteFile(pwfile, []byte(hex.EncodeToString(secret)+"\n"), 0o600); err != nil {
		return err //nolint:wrapcheck // names the file already
	}
	if p.user != nil {
		for _, path := range []string{staging, pwfile} {
			if err := os.Chown(path, int(p.user.UID), int(p.user.GID)); err != nil {
				return err //nolint:wrapcheck // names the file already
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
		// From the standard input, which a user who cannot reach the file's
		// path may read all the same.
		"--pwfile", "/dev/stdin",
		"--auth-local", "trust", // the socket is in the data folder, which is its owner's alone
		// In clear text, which never leaves the machine: the hashing of
		// scram-sha-256 would cost each connection milliseconds.
		"--auth-host", "password",
		"--encoding", "UTF8",
		"--lc-messages", "C",
		"--no-instructions",
	}
	if version >= builtinLocaleVersion {
		// The same order and case everywhere, and no locale of the system.
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
		return err //nolint:wrapcheck // names the files already
	}
	return os.Rename(staging, p.dataDir) //nolint:wrapcheck // names the folders already
}

var (
	errPortTaken  = errors.New("the port is taken")
	errStillInUse = errors.New("processes of a server that was killed have not ended")
)

// launch starts the server's process and waits until it takes connections.
func (p *Postgres) launch(ctx context.Context) error {
	settings := map[string]string{
		"listen_addresses": loopback,
		"port":             strconv.Itoa(p.port),
		// In the data folder: nobody else gets there, and a relative path is
		// never too long for a socket's address.
		"unix_socket_directories": ".",
		"max_connections":         "300",
		"log_line_prefix":         "%m [%p] %d ",
	}
	if !p.options.Durable {
		// synchronous_commit stays on: without it Kill would lose commits, and
		// without fsync it costs next to nothing.
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
		StopSignal: p.farewell(), Grace: stopPatience,
	}, nil); err != nil {
		return err
	}
	if err := p.waitReady(ctx); err != nil {
		p.process().End(killPatience, immediateShutdown)
		return err
	}
	return nil
}

// farewell is the signal for a server whose parent has gone.
func (p *Postgres) farewell() syscall.Signal {
	if p.options.DataDir == "" {
		return immediateShutdown // nobody will read these data
	}
	return fastShutdown
}

func (p *Postgres) waitReady(ctx context.Context) error {
	// Another program on our port may accept the connection and never answer,
	// when our server has long ended because of it.
	connector, err := pq.NewConnector(p.DSN("postgres") + "&connect_timeout=2")
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	db := sql.OpenDB(connector)
	defer func() { _ = db.Close() }()
	for {
		// The query too: a server that starts, or another one on our port,
		// accepts the connection alone.
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

// diagnose tells from the log why the server did not start.
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
	return fmt.Errorf("%w, its log ends:\n%s", p.process().Err(), strings.Join(p.log.Lines(10), "\n"))
}

// DSN is the address of a database, in the form that lib/pq, pgx and psql take.
func (p *Postgres) DSN(database string) string {
	address := url.URL{
		Scheme: "postgres", User: url.UserPassword(postgresUser, p.password),
		Host: net.JoinHostPort(loopback, strconv.Itoa(p.port)), Path: "/" + database,
		RawQuery: "sslmode=disable",
	}
	return address.String()
}

// CreateDatabase makes an empty database and gives its DSN. It is an error if
// there is one of that name.
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

// Kill ends the server like a crash: no checkpoint, connections are cut. The
// data stay; Start recovers them.
func (p *Postgres) Kill() error {
	p.kill(immediateShutdown)
	return nil
}

// Stop shuts the server down, cleanly if its data are kept, and removes a
// temporary folder. Stopping again does nothing.
func (p *Postgres) Stop() error {
	p.stop(p.farewell(), immediateShutdown)
	return nil
}

// clearStaleLock removes the lock file that a crash has left, if its process id
// meanwhile belongs to something that is no PostgreSQL: the server itself only
// looks whether there is a process. In containers ids come back soon.
func clearStaleLock(ctx context.Context, dataDir string) error {
	path := filepath.Join(dataDir, "postmaster.pid")
	content, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err //nolint:wrapcheck // names the file already
	}
	first, _, _ := strings.Cut(string(content), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil || processName(ctx, pid) == "postgres" {
		return nil //nolint:nilerr // the server knows best what to say to it
	}
	if err := os.Remove(path); err != nil {
		return err //nolint:wrapcheck // names the file already
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
		return context.Cause(ctx) //nolint:wrapcheck // the caller's own
	}
}

// postgresEnv is this process's environment without what would configure a
// server or translate its messages, which diagnose reads.
func postgresEnv() []string {
	env := slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return strings.HasPrefix(variable, "PG") || strings.HasPrefix(variable, "LC_") ||
			strings.HasPrefix(variable, "LANG=") || strings.HasPrefix(variable, "LANGUAGE=")
	})
	return append(env, "LC_ALL=C")
}

// postgresBin is the folder of the server's programs.
func postgresBin(ctx context.Context) (string, error) {
	if dir := os.Getenv(engines.PostgresBinEnv); dir != "" {
		version, err := postgresVersion(ctx, dir)
		if err != nil {
			return "", fmt.Errorf("%s: %w", engines.PostgresBinEnv, err)
		}
		if version < oldestVersion {
			return "", fmt.Errorf("%s: %s has PostgreSQL %d, %d or newer is needed", engines.PostgresBinEnv, dir, version, oldestVersion)
		}
		return dir, nil
	}
	fetched, err := engines.Fetch(ctx, engines.Options{Progress: os.Stderr})
	if err != nil {
		return "", err
	}
	return fetched.PostgresBin(ctx)
}
