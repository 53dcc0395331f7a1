// Package httpapi is Diehard's HTTP API. It translates between HTTP and the
// use cases and knows no SQL.
package httpapi

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/labstack/echo/v4"
	"github.com/labstack/gommon/log"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/diehard-outbox/diehard/pkg/groupcommit"
	"github.com/diehard-outbox/diehard/pkg/httpapi/admission"
	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpserver"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/users"
)

// What Options leave out.
const (
	DefaultAddr              = "127.0.0.1:8080"
	DefaultMaxBodyBytes      = 16 << 20
	DefaultReadHeaderTimeout = 5 * time.Second
	DefaultReadTimeout       = 10 * time.Second
	DefaultRequestTimeout    = 15 * time.Second
	DefaultWriteTimeout      = 20 * time.Second
	DefaultIdleTimeout       = 2 * time.Minute
	DefaultShutdownTimeout   = 20 * time.Second
	DefaultMaxConcurrent     = 100
)

// maxHeaderBytes bounds a request's line and headers.
const maxHeaderBytes = 64 << 10

// Options configure a Server. DB, Users, Publisher, Idempotency and Log are
// required.
type Options struct {
	// Addr is host:port to listen on; port 0 takes a free one.
	Addr string
	// DB is where a change has its transaction.
	DB *sqlx.DB
	// Users are the use cases behind /v1/users.
	Users *users.Service
	// Publisher writes the events of /v1/events.
	Publisher *outbox.Publisher
	// Idempotency keeps the answers to requests with an Idempotency-Key.
	Idempotency *idempotency.Keeper
	// Hint is called after events were committed, so that they are delivered at
	// once and not with the relay's next poll. It must not block; nil is none.
	Hint func()
	Log  *slog.Logger
	// Registerer takes the metrics; nil is none.
	Registerer prometheus.Registerer

	// Keys are those that clients may use for /v1. Without any, and with AuthOff
	// false, nobody may.
	Keys []admission.Key
	// AuthOff serves everybody.
	AuthOff bool

	// RatePerKey and RatePerAddress bound the requests of a key and of a client's
	// address, in requests a second; a client that was quiet may make ten seconds'
	// worth at once. 0 is no bound.
	RatePerKey, RatePerAddress float64
	// TrustedProxies are networks whose X-Forwarded-For tells the client's
	// address.
	TrustedProxies []netip.Prefix
	// MaxConcurrent bounds the requests that work with the database at once, or
	// wait for one of its connections; more are shed.
	MaxConcurrent int

	// MaxBodyBytes bounds a request's body.
	MaxBodyBytes int64

	// ReadHeaderTimeout bounds the time in which a request's headers arrive,
	// ReadTimeout headers and body: a slow client is cut off, and holds
	// nothing but its connection until then.
	ReadHeaderTimeout, ReadTimeout time.Duration
	// RequestTimeout bounds the handling of a request, from the end of its
	// headers on. It reaches PostgreSQL as a cancellation.
	RequestTimeout time.Duration
	// WriteTimeout bounds the time from the end of the headers to the end of
	// the answer. It has to be longer than RequestTimeout: once it is over, the
	// connection closes without an answer.
	WriteTimeout time.Duration
	// IdleTimeout is how long a connection is kept for a next request.
	IdleTimeout time.Duration
	// ShutdownTimeout is how long Run waits for requests in flight when it is
	// told to stop.
	ShutdownTimeout time.Duration
}

func (o *Options) setDefaults() {
	if o.Hint == nil {
		o.Hint = func() {}
	}
	setDefault(&o.Addr, DefaultAddr)
	setDefault(&o.MaxBodyBytes, DefaultMaxBodyBytes)
	setDefault(&o.ReadHeaderTimeout, DefaultReadHeaderTimeout)
	setDefault(&o.ReadTimeout, DefaultReadTimeout)
	setDefault(&o.RequestTimeout, DefaultRequestTimeout)
	setDefault(&o.WriteTimeout, DefaultWriteTimeout)
	setDefault(&o.IdleTimeout, DefaultIdleTimeout)
	setDefault(&o.ShutdownTimeout, DefaultShutdownTimeout)
	setDefault(&o.MaxConcurrent, DefaultMaxConcurrent)
}

func setDefault[T comparable](option *T, value T) {
	var zero T
	if *option == zero {
		*option = value
	}
}

// Server serves the API.
type Server struct {
	options   Options
	users     *users.Service
	log       *slog.Logger
	requests  *prometheus.HistogramVec
	shedder   *admission.Shedder
	creations *groupcommit.Committer[users.NewUser, users.Result]
	echo      *echo.Echo
	http      *httpserver.Server
}

// New returns a Server that does not listen yet. It panics where the
// registerer has the server's metrics already.
func New(o Options) *Server {
	o.setDefaults()
	s := &Server{
		options:  o,
		users:    o.Users,
		log:      o.Log,
		requests: newRequestHistogram(o.Registerer),
		shedder: admission.NewShedder(admission.ShedderOptions{
			MaxConcurrent: o.MaxConcurrent,
			Ping:          func(ctx context.Context) error { return o.DB.PingContext(ctx) },
			IsOutage:      isOutage,
		}),
		echo: echo.New(),
	}
	s.creations = groupcommit.New(s.createTogether)
	s.echo.IPExtractor = admission.ClientAddress(o.TrustedProxies)
	s.echo.Logger.SetLevel(log.OFF) // everything worth a line is logged by the middleware
	s.echo.HTTPErrorHandler = s.answerError
	s.echo.Use(s.identify, s.observe, s.trace, s.limitTime, s.recoverPanics)
	s.echo.Use(admission.New(admission.Options{
		Covers:         underV1,
		Keys:           o.Keys,
		AuthOff:        o.AuthOff,
		RatePerKey:     o.RatePerKey,
		RatePerAddress: o.RatePerAddress,
		Registerer:     o.Registerer,
	})...)

	s.echo.POST("/v1/users", s.createUser, withoutQuery)
	s.get("/v1/users", s.listUsers)
	s.get("/v1/users/:id", s.getUser, withoutQuery)
	s.echo.POST("/v1/users/batch", s.createUsers)
	s.echo.POST("/v1/events", s.publishEvent, withoutQuery)
	s.echo.POST("/v1/events/batch", s.publishEvents)
	s.get("/openapi.json", s.getOpenAPI)
	s.get("/docs", s.docsFile("index.html"))
	for _, name := range []string{"page.js", "swagger-ui-bundle.js", "swagger-ui.css"} {
		s.get("/docs/"+name, s.docsFile(name))
	}
	s.http = httpserver.New(httpserver.Options{
		Name: "HTTP API",
		Log:  o.Log,
		HTTP: &http.Server{
			Addr:              o.Addr,
			Handler:           s.echo,
			MaxHeaderBytes:    maxHeaderBytes,
			ReadHeaderTimeout: o.ReadHeaderTimeout,
			ReadTimeout:       o.ReadTimeout,
			WriteTimeout:      o.WriteTimeout,
			IdleTimeout:       o.IdleTimeout,
		},
		ShutdownTimeout: o.ShutdownTimeout,
	})
	return s
}

// get registers the handler for HEAD too; net/http leaves the body out.
func (s *Server) get(path string, handler echo.HandlerFunc, middleware ...echo.MiddlewareFunc) {
	s.echo.GET(path, handler, middleware...)
	s.echo.HEAD(path, handler, middleware...)
}

// Routes returns what the server answers, as METHOD /path lines with :name for
// what varies.
func (s *Server) Routes() []string {
	routes := make([]string, 0, len(s.echo.Routes()))
	for _, route := range s.echo.Routes() {
		routes = append(routes, route.Method+" "+route.Path)
	}
	return routes
}

// readObject reads the request's body.
func (s *Server) readObject(c echo.Context) (*input.Object, error) {
	return input.ReadObject(c.Response().Writer, c.Request(), s.options.MaxBodyBytes)
}

// Addr returns the host:port that the server listens on, or an empty string
// before Run listens.
func (s *Server) Addr() string { return s.http.Addr() }

// Run listens and serves until ctx is canceled. Then it accepts no more
// connections, finishes the requests in flight within ShutdownTimeout, cuts
// off what is left, and returns: nil where all were finished,
// httpserver.ErrCutOff otherwise. Any other error means that it could not listen
// or serve. It is called once.
func (s *Server) Run(ctx context.Context) error {
	running, stop := context.WithCancel(context.WithoutCancel(ctx)) // while there are requests
	defer stop()
	go s.shedder.Run(running)
	return s.http.Run(ctx)
}
