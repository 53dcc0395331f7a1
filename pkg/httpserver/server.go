// Package httpserver runs an HTTP server until its context ends: it listens, serves and
// shuts down. The HTTP API and the admin port use it.
package httpserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// Options configures a Server. All fields are required.
type Options struct {
	// Name is the name of the server in the log and in errors, such as HTTP API.
	Name string
	Log  *slog.Logger
	// HTTP sets the address, the handler, the timeouts and the limits. Port 0 picks
	// a free port. Run sets BaseContext and ErrorLog.
	HTTP *http.Server
	// ShutdownTimeout is how long Run waits for requests in flight.
	ShutdownTimeout time.Duration
}

// Server is an HTTP server with a graceful shutdown.
type Server struct {
	o    Options
	addr atomic.Value // a string, set when the server listens
}

// New returns a Server that is not listening yet.
func New(o Options) *Server { return &Server{o: o} }

// ErrCutOff is returned by Run if the server stopped before all requests finished.
var ErrCutOff = errors.New("requests in flight were cut off")

// Addr returns the host:port that the server listens on. It is empty until Run
// listens and has logged the address.
func (s *Server) Addr() string {
	addr, _ := s.addr.Load().(string)
	return addr
}

// Run listens and serves until ctx is canceled. Then it accepts no more connections,
// waits up to ShutdownTimeout for requests in flight, and cancels the contexts of the
// remaining requests. Run must be called only once.
//
// Run returns nil if all requests finished, or if ctx was canceled before the server
// listened. It returns ErrCutOff if requests did not finish in time, and another error
// if it cannot listen or serve.
func (s *Server) Run(ctx context.Context) error {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", s.o.HTTP.Addr)
	if err != nil {
		if ctx.Err() != nil {
			return nil // ctx ended during the lookup of the host name
		}
		return fmt.Errorf("start the %s: %w", s.o.Name, err)
	}
	addr := listener.Addr().String()
	s.o.Log.InfoContext(ctx, s.o.Name+" listens", "addr", addr) //nolint:sloglint // the name is constant
	s.addr.Store(addr)                                          // Addr returns it only after the log record

	// The contexts of requests outlive ctx, so that requests in flight can finish.
	// These contexts end with Run.
	requests, cutOff := context.WithCancel(context.WithoutCancel(ctx))
	defer cutOff()
	server := s.o.HTTP
	server.BaseContext = func(net.Listener) context.Context { return requests }
	server.ErrorLog = slog.NewLogLogger(s.o.Log.Handler(), slog.LevelWarn)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve the %s: %w", s.o.Name, err)
	case <-ctx.Done():
	}

	deadline, cancel := context.WithTimeout(requests, s.o.ShutdownTimeout)
	defer cancel()
	if err := server.Shutdown(deadline); err != nil {
		_ = server.Close()
		return fmt.Errorf("stop the %s within %s: %w: %w", s.o.Name, s.o.ShutdownTimeout, ErrCutOff, err)
	}
	return nil
}
