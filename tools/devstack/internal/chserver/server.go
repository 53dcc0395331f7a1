// Package chserver turns ClickHouse's embedded engine into a server. It serves
// ClickHouse's HTTP interface and its native TCP protocol, so that drivers,
// migrations, curl and database tools work as with clickhouse-server.
//
// It is for development and tests only: it has one user, listens only on the
// loopback interface, and lets SQL functions such as file() access the host.
package chserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// Options configures a [Server].
type Options struct {
	// Library is the path of libchdb.so.
	Library string
	// DataDir is the data folder, which is created if missing.
	DataDir string
	// HTTPAddr and NativeAddr are host:port on the loopback interface. Port 0
	// picks a free port; an empty address means 127.0.0.1:0.
	HTTPAddr, NativeAddr string
	// User and Password are the credentials of clients. The default user is
	// "default". If Password is empty, clients need no password.
	User, Password string
	// Log receives warnings about broken connections. If nil, they are dropped.
	Log *slog.Logger
}

// Server is a running engine that listens. A process can have only one Server.
type Server struct {
	engine      *chengine.Engine
	version     version
	credentials credentials
	log         *slog.Logger
	http        net.Listener
	native      net.Listener

	// changes counts statements that may have changed a table.
	changes atomic.Uint64
}

// New starts the engine and listens. Clients wait until Serve is called. It
// returns a *chengine.InUseError if another process uses the data folder.
func New(o Options) (*Server, error) {
	s := &Server{credentials: newCredentials(o.User, o.Password), log: o.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}

	var err error
	if s.http, err = listen(o.HTTPAddr); err != nil {
		return nil, err
	}
	if s.native, err = listen(o.NativeAddr); err != nil {
		return nil, errors.Join(err, s.http.Close())
	}
	if s.engine, err = chengine.Open(o.Library, o.DataDir); err != nil {
		return nil, errors.Join(err, s.http.Close(), s.native.Close())
	}
	if s.version, err = readVersion(s.engine); err != nil {
		s.engine.Close()
		return nil, errors.Join(err, s.http.Close(), s.native.Close())
	}
	return s, nil
}

func listen(address string) (net.Listener, error) {
	if address == "" {
		address = "127.0.0.1:0"
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	if ip := net.ParseIP(host); host != "localhost" && !ip.IsLoopback() {
		return nil, fmt.Errorf("listen on %s: not a loopback address", address)
	}
	listener, err := net.Listen("tcp", address) //nolint:noctx // returns at once
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return listener, nil
}

// HTTPAddr returns the host:port of the HTTP interface.
func (s *Server) HTTPAddr() string {
	return s.http.Addr().String()
}

// NativeAddr returns the host:port of the native protocol.
func (s *Server) NativeAddr() string {
	return s.native.Addr().String()
}

// Serve serves clients until ctx is canceled. Then it closes all connections,
// which cancels their statements, stops the engine and returns nil. It must be
// called only once.
func (s *Server) Serve(ctx context.Context) error {
	defer s.engine.Close()
	group, ctx := errgroup.WithContext(ctx)

	web := &http.Server{
		Handler:           s.handler(),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
	group.Go(func() error {
		if err := web.Serve(s.http); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve HTTP: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		return web.Close()
	})
	group.Go(func() error { return s.serveNative(ctx) })
	return group.Wait() //nolint:wrapcheck // an error of Serve itself
}
