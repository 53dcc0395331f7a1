// Package httpapi is Diehard's HTTP API. It translates between HTTP and the use
// cases. It contains no SQL.
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
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/diehard-outbox/diehard/pkg/groupcommit"
	"github.com/diehard-outbox/diehard/pkg/httpapi/admission"
	"github.com/diehard-outbox/diehard/pkg/httpapi/input"
	"github.com/diehard-outbox/diehard/pkg/httpapi/scope"
	"github.com/diehard-outbox/diehard/pkg/httpserver"
	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/users"
)

// Defaults of Options.
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

// maxHeaderBytes limits a request's first line and headers.
const maxHeaderBytes = 64 << 10

// Options configure a Server. DB, Users, Publisher, Idempotency and Log are
// required.
type Options struct {
	// Addr is the host:port to listen on. Port 0 chooses a free port.
	Addr string
	// DB is the pool for transactions that change data. Its sessions should have a short
	// lock_timeout: see LockTimeout.
	DB *sqlx.DB
	// Ping returns nil if the database responds. It should not need a connection of DB,
	// because requests may hold all of them. The default pings DB.
	Ping func(context.Context) error
	// Users is the service for /v1/users.
	Users *users.Service
	// Publisher writes the events of /v1/events.
	Publisher *outbox.Publisher
	// Idempotency stores the responses to requests with an Idempotency-Key.
	Idempotency *idempotency.Keeper
	// Hint is called after events are committed, so that relays do not wait for
	// their next poll. It must not block. It may be nil.
	Hint func()
	Log  *slog.Logger
	// Registerer registers the metrics. It may be nil.
	Registerer prometheus.Registerer
	// Tracer makes the spans of requests. If it is nil, requests have no spans, but Sentry
	// transactions if Sentry is enabled.
	Tracer trace.Tracer

	// Keys are the API keys of the clients of /v1. If Keys is empty and AuthOff is
	// false, every request below /v1 is refused.
	Keys []admission.Key
	// AuthOff turns authentication off.
	AuthOff bool

	// AddressesOff omits the clients' addresses from the log.
	AddressesOff bool

	// RatePerKey and RatePerAddress limit the requests per second of a key and of a
	// client's address. A burst may be ten times the rate. 0 means no limit.
	RatePerKey, RatePerAddress float64
	// TrustedProxies are the networks of proxies whose X-Forwarded-For header is
	// trusted.
	TrustedProxies []netip.Prefix
	// MaxConcurrent limits the requests that use the database, or wait for one of its
	// connections, at the same time. Further requests wait for a second, or are shed if
	// they would wait longer.
	MaxConcurrent int

	// Full returns whether the outbox is full. The server then refuses events and, with
	// FullRefusesChanges, all changes. Full may be nil.
	Full               func() bool
	FullRefusesChanges bool

	// MaxBodyBytes limits the size of a request's body.
	MaxBodyBytes int64
	// BodyBudget limits the size of all bodies that the process holds at the same time.
	// Further requests are shed. It must be at least four thirds of MaxBodyBytes. The
	// default is twice MaxBodyBytes, and the least value is input.MinBudget.
	BodyBudget int64
	// DocsOff turns off /docs.
	DocsOff bool

	// ReadHeaderTimeout limits the time to receive a request's headers, and ReadTimeout
	// the time to receive headers and body. Until the request is complete, a slow
	// client occupies only its connection.
	ReadHeaderTimeout, ReadTimeout time.Duration
	// RequestTimeout limits the handling of a request, from the end of its headers.
	// After this time, the server cancels the statement in PostgreSQL.
	RequestTimeout time.Duration
	// WriteTimeout limits the time from the end of the headers to the end of the
	// response. After this time, the server closes the connection without a response.
	// Therefore WriteTimeout must be longer than RequestTimeout.
	WriteTimeout time.Duration
	// IdleTimeout is how long an idle connection stays open.
	IdleTimeout time.Duration
	// ShutdownTimeout limits how long Run waits for requests in flight when it stops.
	ShutdownTimeout time.Duration
}

func (o *Options) setDefaults() {
	if o.Hint == nil {
		o.Hint = func() {}
	}
	if o.Full == nil {
		o.Full = func() bool { return false }
	}
	if o.Ping == nil {
		o.Ping = func(ctx context.Context) error { return o.DB.PingContext(ctx) }
	}
	setDefault(&o.Addr, DefaultAddr)
	setDefault(&o.MaxBodyBytes, DefaultMaxBodyBytes)
	setDefault(&o.BodyBudget, 2*o.MaxBodyBytes)
	setDefault(&o.ReadHeaderTimeout, DefaultReadHeaderTimeout)
	setDefault(&o.ReadTimeout, DefaultReadTimeout)
	setDefault(&o.RequestTimeout, DefaultRequestTimeout)
	setDefault(&o.WriteTimeout, DefaultWriteTimeout)
	setDefault(&o.IdleTimeout, DefaultIdleTimeout)
	setDefault(&o.ShutdownTimeout, DefaultShutdownTimeout)
	setDefault(&o.MaxConcurrent, DefaultMaxConcurrent)
}

const (
	// LockTimeout is the lock_timeout for the sessions of Options.DB. A transaction that
	// needs longer begins again, and only few such transactions wait at the same time.
	LockTimeout = groupcommit.SlotTimeout
	// lockShare is the share of the connections, one of so many, that may wait for locks.
	lockShare = 4
	// maxWait limits how long a request above MaxConcurrent waits.
	maxWait = time.Second
	// minTime is the least time that a request must have left to join a group: the group
	// ends at the first deadline of its requests.
	minTime = 2 * time.Second
)

// maxConnections returns the limit of the pool, or MaxConcurrent if it has no limit.
func (o *Options) maxConnections() int {
	if o.DB != nil {
		if limit := o.DB.Stats().MaxOpenConnections; limit > 0 {
			return limit
		}
	}
	return o.MaxConcurrent
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
	tracer    trace.Tracer
	requests  *prometheus.HistogramVec
	shedder   *admission.Shedder
	bodies    *input.Budget
	lockWaits chan struct{} // limits the transactions that wait for a lock
	outage    *outage
	shedding  *shedding
	reusers   *reusers
	creations *groupcommit.Committer[creation, users.Result]
	echo      *echo.Echo
	http      *httpserver.Server
}

// New returns a Server that does not listen yet. It panics if the server's metrics
// are already registered.
func New(o Options) *Server {
	o.setDefaults()
	s := &Server{
		options:  o,
		users:    o.Users,
		log:      o.Log,
		tracer:   o.Tracer,
		requests: newRequestHistogram(o.Registerer),
		shedder: admission.NewShedder(admission.ShedderOptions{
			MaxConcurrent: o.MaxConcurrent,
			MaxWait:       min(maxWait, o.RequestTimeout/4),
			Ping:          o.Ping,
			IsOutage:      isOutage,
		}),
		bodies:   input.NewBudget(o.BodyBudget),
		outage:   &outage{log: o.Log},
		shedding: newShedding(o.Registerer, o.Log),
		reusers:  &reusers{until: map[string]time.Time{}},
		echo:     echo.New(),
	}
	if s.tracer == nil {
		s.tracer = noop.Tracer{}
	}
	registerBodyGauge(o.Registerer, s.bodies)
	registerWaitingGauge(o.Registerer, s.shedder)
	s.lockWaits = make(chan struct{}, max(1, o.maxConnections()/lockShare))
	s.creations = groupcommit.New(groupcommit.Options[creation, users.Result]{
		Commit: s.createGroup, MinTime: min(minTime, o.RequestTimeout/4), Key: creation.keyInGroup,
	})
	s.echo.IPExtractor = admission.ClientAddress(o.TrustedProxies)
	s.echo.Logger.SetLevel(log.OFF) // the middleware logs requests and errors
	s.echo.HTTPErrorHandler = s.sendProblem
	s.echo.Pre(decodePath)
	s.echo.Use(s.identify, s.observe, s.trace, s.limitTime, s.recoverPanics)
	if o.AuthOff && isLoopback(o.Addr) {
		s.echo.Use(onlyLoopback)
	}
	s.echo.Use(admission.New(admission.Options{
		Covers:         underV1,
		Keys:           o.Keys,
		AuthOff:        o.AuthOff,
		RatePerKey:     o.RatePerKey,
		RatePerAddress: o.RatePerAddress,
		Registerer:     o.Registerer,
	})...)
	s.echo.Use(s.refuseIfFull, s.limitBodies)

	readUsers, writeUsers, publishEvents := admission.Require(scope.ReadUsers), admission.Require(scope.WriteUsers), admission.Require(scope.PublishEvents)
	s.echo.POST("/v1/users", s.withBody(s.createUser, input.JSON), writeUsers, withoutQuery)
	s.get("/v1/users", s.listUsers, readUsers)
	s.get("/v1/users/:id", s.getUser, readUsers, withoutQuery)
	// The response to a PATCH has all values of the user.
	s.echo.PATCH("/v1/users/:id", s.withBody(s.updateUser, input.MergePatch, input.JSON), writeUsers, readUsers, withoutQuery)
	s.echo.DELETE("/v1/users/:id", s.deleteUser, writeUsers, withoutQuery)
	s.echo.POST("/v1/users/batch", s.withBody(s.createUsers, input.JSON), writeUsers)
	s.echo.PATCH("/v1/users/batch", s.withBody(s.updateUsers, input.JSON), writeUsers, readUsers)
	s.echo.POST("/v1/users/batch/delete", s.withBody(s.deleteUsers, input.JSON), writeUsers)
	s.echo.POST("/v1/events", s.withBody(s.publishEvent, input.JSON), publishEvents, withoutQuery)
	s.echo.POST("/v1/events/batch", s.withBody(s.publishEvents, input.JSON), publishEvents)
	s.get("/openapi.json", s.getOpenAPI)
	if !o.DocsOff {
		s.get("/docs", s.docsFile("index.html"))
		for _, name := range []string{"page.js", "swagger-ui-bundle.js", "swagger-ui.css"} {
			s.get("/docs/"+name, s.docsFile(name))
		}
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

// get registers the handler for GET and HEAD. net/http omits the body for HEAD.
func (s *Server) get(path string, handler echo.HandlerFunc, middleware ...echo.MiddlewareFunc) {
	s.echo.GET(path, handler, middleware...)
	s.echo.HEAD(path, handler, middleware...)
}

// Routes returns the server's routes in the form METHOD /path. A parameter is
// written :name.
func (s *Server) Routes() []string {
	routes := make([]string, 0, len(s.echo.Routes()))
	for _, route := range s.echo.Routes() {
		routes = append(routes, route.Method+" "+route.Path)
	}
	return routes
}

// Addr returns the host:port that the server listens on, or an empty string
// before Run listens.
func (s *Server) Addr() string { return s.http.Addr() }

// Run listens and serves until ctx is canceled. Then it accepts no more connections and
// waits up to ShutdownTimeout for the requests in flight. It returns nil if all
// requests finished, and httpserver.ErrCutOff if it closed the connections of
// unfinished requests. Any other error means that the server could not listen or serve.
// Run must be called only once.
func (s *Server) Run(ctx context.Context) error {
	running, stop := context.WithCancel(context.WithoutCancel(ctx)) // until the last request has ended
	defer stop()
	go s.shedder.Run(running)
	return s.http.Run(ctx)
}
