package devstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/engines"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/supervisor"
)

// PgBouncerOptions configures StartPgBouncer.
type PgBouncerOptions struct {
	// Target is the URL of a PostgreSQL server with a user and a password. The pooler
	// connects to all databases of the server as this user.
	Target string
	// PoolMode is session, transaction or statement. The default is transaction.
	PoolMode string
	// PoolSize is the number of server connections for each database. The default is 20.
	PoolSize int
	// Log receives the pooler's log; nil drops it.
	Log io.Writer
}

// PgBouncer is a private connection pooler. It accepts every user and password.
type PgBouncer struct {
	server

	options PgBouncerOptions
	target  *url.URL
	port    int
}

// StartPgBouncer starts a pooler and returns when it accepts connections. The pooler ends
// when this process ends.
func StartPgBouncer(ctx context.Context, o PgBouncerOptions) (*PgBouncer, error) {
	target, err := url.Parse(o.Target)
	if err != nil || target.User == nil {
		return nil, errors.New("start PgBouncer: the target must be a postgres:// URL with a user")
	}
	if o.PoolMode == "" {
		o.PoolMode = "transaction"
	}
	if o.PoolSize <= 0 {
		o.PoolSize = 20
	}
	p := &PgBouncer{server: server{out: o.Log}, options: o, target: target}
	if err := p.start(ctx); err != nil {
		_ = p.Stop()
		return nil, fmt.Errorf("start PgBouncer: %w", err)
	}
	return p, nil
}

// DSN returns the URL of a database through the pooler.
func (p *PgBouncer) DSN(database string) string {
	through := *p.target
	through.Host, through.Path = net.JoinHostPort(loopback, strconv.Itoa(p.port)), "/"+database
	return through.String()
}

// Stop stops the pooler.
func (p *PgBouncer) Stop() error {
	p.stop(syscall.SIGTERM)
	return nil
}

func (p *PgBouncer) start(ctx context.Context) error {
	p.life.Lock()
	defer p.life.Unlock()
	if _, err := p.prepare("pgbouncer"); err != nil {
		return err
	}
	path, err := engines.PgBouncer(ctx, engines.Options{})
	if err != nil {
		return err
	}
	user, err := serverUser(p.dataDir)
	if err != nil {
		return err
	}
	if p.port, err = p.reserve(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(p.dataDir, 0o700); err != nil {
		return err //nolint:wrapcheck // the error names the folder
	}
	config := filepath.Join(p.dataDir, "pgbouncer.ini")
	if err := os.WriteFile(config, []byte(p.config()), 0o600); err != nil {
		return err //nolint:wrapcheck // the error names the file
	}
	argument := config
	if user != nil {
		for _, name := range []string{p.dataDir, config} {
			if err := os.Chown(name, int(user.UID), int(user.GID)); err != nil {
				return err //nolint:wrapcheck // the error names the file
			}
		}
		argument = "/proc/self/cwd/pgbouncer.ini" // the user may not reach the folders above it
	}
	if err := p.run(supervisor.Command{
		Path: path, Args: []string{argument}, Dir: p.dataDir, User: user, StopSignal: syscall.SIGTERM, Grace: killPatience,
	}, nil); err != nil {
		return err
	}
	return p.awaitPort(ctx)
}

func (p *PgBouncer) config() string {
	password, _ := p.target.User.Password()
	quote := func(value string) string { return "'" + strings.ReplaceAll(value, "'", "''") + "'" }
	return strings.Join([]string{
		"[databases]",
		fmt.Sprintf("* = host=%s port=%s user=%s password=%s", p.target.Hostname(), p.target.Port(), quote(p.target.User.Username()), quote(password)),
		"[pgbouncer]",
		"listen_addr = " + loopback,
		"listen_port = " + strconv.Itoa(p.port),
		"unix_socket_dir =",
		"auth_type = any",
		"pool_mode = " + p.options.PoolMode,
		"default_pool_size = " + strconv.Itoa(p.options.PoolSize),
		"max_client_conn = 1000",
		"",
	}, "\n")
}

// awaitPort waits until the pooler accepts connections.
func (p *PgBouncer) awaitPort(ctx context.Context) error {
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(loopback, strconv.Itoa(p.port)))
		if err == nil {
			return conn.Close() //nolint:wrapcheck // cannot fail
		}
		timer := time.NewTimer(readyPoll)
		select {
		case <-timer.C:
		case <-p.process().Done():
			timer.Stop()
			return fmt.Errorf("it ended: %s", strings.Join(p.log.Lines(5), "\n"))
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("not ready: %w", context.Cause(ctx))
		}
	}
}

// Kill ends the pooler like a crash.
func (p *PgBouncer) Kill() error {
	p.kill(syscall.SIGKILL)
	return nil
}
