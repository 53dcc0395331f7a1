// Package httpserver listens, serves and shuts down, for the HTTP API and for
// the admin port alike.
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

// Options configure a Server. All fields are required.
type Options struct {
	// Name is the server's name in the log and in errors, such as HTTP API.
	Name string
	Log  *slog.Logger
	// HTTP has the address, the handler, the timeouts and the bounds. Port 0 takes
	// a free port. Run sets BaseContext and ErrorLog.
	HTTP *http.Server
	// ShutdownTimeout is how long Run waits for requests in flight.
	ShutdownTimeout time.Duration
}

// Server serves HTTP until it is told to stop.
type Server struct {
	o    Options
	addr atomic.Value // string, set when the server listens
}

// New returns a Server that does not listen yet.
func New(o Options) *Server { return &Server{o: o} }

// ErrCutOff is an error of Run: the server stopped, but not every request was
// finished.
var ErrCutOff = errors.New("requests in flight were cut off")

// Addr returns the host:port that the server listens on. It is empty until Run
// listens and has logged the address.
func (s *Server) Addr() string {
	addr, _ := s.addr.Load().(string)
	return addr
}

// Run listens and serves until ctx is canceled. Then it accepts no more
// connections, waits up to ShutdownTimeout for requests in flight, and cancels
// the contexts of the others. It returns nil when all requests were finished, or
// when ctx was canceled before the server listened; ErrCutOff when requests were
// cut off; another error when it could not listen or serve. It is called once.
func (s *Server) Run(ctx context.Context) error {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", s.o.HTTP.Addr)
	if err != nil {
		if ctx.Err() != nil {
			return nil // stopped while a host name was looked up
		}
		return fmt.Errorf("start the %s: %w", s.o.Name, err)
	}
	addr := listener.Addr().String()
	s.o.Log.InfoContext(ctx, s.o.Name+" listens", "addr", addr) //nolint:sloglint // a constant of each server
	s.addr.Store(addr)                                          // after the log has named it

	// The contexts of requests outlive ctx, so that they can be finished, but they
	// do not outlive Run.
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
