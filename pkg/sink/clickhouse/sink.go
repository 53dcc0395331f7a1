// Package clickhouse implements a sink that delivers events to ClickHouse.
//
// It supports both protocols of ClickHouse and any DSN of clickhouse-go. It sends each
// insert as one block with a deduplication token. It reads system.processes to find
// inserts in flight, and the table to check presence. Open sets the driver's options, and
// Check verifies the server's settings.
package clickhouse

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	chgo "github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"go.opentelemetry.io/otel/attribute"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Defaults of Options and of a DSN.
const (
	DefaultTable        = "event_log"
	DefaultMaxOpenConns = 10

	// defaultDialTimeout bounds the dial with its handshake, and the wait for a free
	// connection.
	defaultDialTimeout = 5 * time.Second
	// defaultReadTimeout is longer than every deadline, because contexts carry the
	// deadlines. The driver's default of 5 minutes would end a longer insert.
	defaultReadTimeout = time.Hour
)

// Options configure a Sink.
type Options struct {
	// DSN is a DSN of clickhouse-go: clickhouse://, tcp://, http://, or https:// with
	// secure=true. It overrides the defaults, but not the settings that inserts depend
	// on. The default compression is LZ4, or none for a server on this machine. The DSN
	// can set compress=none or compress=lz4.
	//
	// Several hosts must be replicas of one shard of Cluster.
	DSN string
	// Table is the table's name in the DSN's database: letters, digits and
	// underscores. Empty means DefaultTable.
	Table string
	// Cluster is the name of the cluster that replicates the table. Empty means
	// a single server.
	Cluster string
	// MaxOpenConns bounds the connections of inserts, and separately all other
	// connections, unless the DSN has its own limit. Each insert holds one connection,
	// and each call of InFlight, Present, Check and Ping needs one connection. 0 means
	// DefaultMaxOpenConns.
	MaxOpenConns int
	// MaxDialTimeout bounds the dial with its handshake, even if the DSN has a longer
	// dial_timeout. 0 means no further bound.
	MaxDialTimeout time.Duration

	// host replaces the hosts of DSN, unless it is empty.
	host string
}

// Sink delivers events to a ClickHouse table. It is safe for concurrent use.
type Sink struct {
	conn driver.Conn
	// inserts has the connections of inserts up to keptBytes. Unlike the connections of
	// conn, they keep the memory of an encoded insert for the next insert.
	inserts driver.Conn

	table   string // quoted
	name    string
	cluster string
	http    bool
	// readonly says that the DSN sets readonly.
	readonly bool
	// database, user, addresses and secure come from the DSN, for messages.
	database, user string
	addresses      []string
	secure         bool

	// dials counts new connections. A new connection may reach a server that was
	// upgraded.
	dials *atomic.Uint64
	known atomic.Pointer[serverFacts]
	// accepted are the settings that the server has last accepted with a query.
	accepted atomic.Pointer[chgo.Settings]

	encoders sync.Pool // of *encoder
}

var _ sink.Sink = (*Sink)(nil)

// Check returns an error if the options are malformed. The error contains no password.
func (o Options) Check() error {
	_, _, err := parse(o)
	return err
}

// Open returns a sink. It does not connect. It returns an error if the options are
// malformed. The error contains no password.
func Open(o Options) (*Sink, error) {
	o, driverOptions, err := parse(o)
	if err != nil {
		return nil, err
	}
	s := &Sink{
		table:     quoteIdentifier(o.Table),
		name:      o.Table,
		cluster:   o.Cluster,
		http:      driverOptions.Protocol == chgo.HTTP,
		readonly:  isSet(driverOptions.Settings, "readonly"),
		database:  driverOptions.Auth.Database,
		user:      cmp.Or(driverOptions.Auth.Username, "default"),
		addresses: driverOptions.Addr,
		secure:    driverOptions.TLS != nil,
		dials:     new(atomic.Uint64),
	}
	driverOptions.DialStrategy = func(ctx context.Context, id int, opt *chgo.Options, dial chgo.Dial) (chgo.DialResult, error) {
		s.dials.Add(1)
		return chgo.DefaultDialStrategy(ctx, id, opt, closing(dial))
	}
	if s.conn, err = chgo.Open(driverOptions); err != nil {
		return nil, fmt.Errorf("open clickhouse: %w", err)
	}
	keeping := *driverOptions
	keeping.FreeBufOnConnRelease = false
	if s.inserts, err = chgo.Open(&keeping); err != nil {
		return nil, fmt.Errorf("open clickhouse: %w", errors.Join(err, s.conn.Close()))
	}
	return s, nil
}

// Attributes describes the sink in spans.
// https://opentelemetry.io/docs/specs/semconv/db/database-spans/
func (s *Sink) Attributes() attribute.Set {
	attributes := []attribute.KeyValue{
		semconv.DBSystemNameClickHouse, semconv.DBNamespace(s.database), semconv.DBCollectionName(s.name),
	}
	if len(s.addresses) == 1 { // the sink does not know the replica that the driver chooses
		if host, port, err := net.SplitHostPort(s.addresses[0]); err == nil {
			number, _ := strconv.Atoi(port)
			attributes = append(attributes, semconv.ServerAddress(host), semconv.ServerPort(number))
		}
	}
	return attribute.NewSet(attributes...)
}

// Ping implements sink.Sink.
func (s *Sink) Ping(ctx context.Context) error {
	ctx, err := s.resolving(ctx)
	if err != nil {
		return err
	}
	// The driver's Ping ignores the cancellation of the context.
	var one uint8
	if err := s.conn.QueryRow(ctx, "SELECT 1").Scan(&one); err != nil {
		return s.classify(ctx, "ping", err)
	}
	return nil
}

// Close closes idle connections at once, and busy connections when they are released.
func (s *Sink) Close() error {
	if err := errors.Join(s.inserts.Close(), s.conn.Close()); err != nil {
		return fmt.Errorf("close clickhouse: %w", err)
	}
	return nil
}

var (
	tableName   = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	clusterName = regexp.MustCompile(`^[A-Za-z0-9_{}.-]+$`)
)

// parse returns the options with their defaults, and the driver's options.
func parse(o Options) (complete Options, d *chgo.Options, err error) {
	d, err = chgo.ParseDSN(o.DSN)
	if err != nil {
		return o, nil, fmt.Errorf("clickhouse dsn: %w", err) // the driver masks credentials
	}
	o.Table = cmp.Or(o.Table, DefaultTable)
	if o.host != "" {
		d.Addr = []string{o.host}
	}
	switch {
	case !supportedScheme(o.DSN):
		return o, nil, errors.New("clickhouse dsn: the scheme must be clickhouse, tcp, http or https")
	case !tableName.MatchString(o.Table):
		return o, nil, fmt.Errorf("clickhouse table %q: only letters, digits and underscores are allowed", o.Table)
	case o.Cluster != "" && !clusterName.MatchString(o.Cluster):
		return o, nil, fmt.Errorf("clickhouse cluster %q: only letters, digits and _ - . { } are allowed", o.Cluster)
	case strings.Contains(d.Auth.Database, "/"):
		return o, nil, fmt.Errorf("clickhouse dsn: the path is %q, but must be the name of a database after one slash, as in /default",
			"/"+d.Auth.Database)
	case len(d.Addr) > 1 && o.Cluster == "":
		// An insert and its presence check may use different hosts.
		return o, nil, errors.New("clickhouse dsn: several hosts require clickhouse.cluster, the cluster of which they are replicas")
	}

	d.DialTimeout = cmp.Or(d.DialTimeout, defaultDialTimeout)
	if o.MaxDialTimeout > 0 {
		d.DialTimeout = min(d.DialTimeout, o.MaxDialTimeout)
	}
	d.ReadTimeout = cmp.Or(d.ReadTimeout, defaultReadTimeout)
	d.MaxOpenConns = cmp.Or(d.MaxOpenConns, o.MaxOpenConns, DefaultMaxOpenConns)
	d.MaxIdleConns = cmp.Or(d.MaxIdleConns, d.MaxOpenConns)
	// An idle connection then does not keep the memory of a large batch.
	d.FreeBufOnConnRelease = true
	if d.Compression == nil && slices.ContainsFunc(d.Addr, isRemote) {
		d.Compression = &chgo.Compression{Method: chgo.CompressionLZ4}
	}
	if d.Protocol == chgo.HTTP {
		d.TransportFunc = func(t *http.Transport) (http.RoundTripper, error) { return responses{t}, nil }
	} else {
		d.DialContext = dialer(d)
	}
	return o, d, nil
}

// isRemote returns whether a host:port is on another machine. Compression for a local
// server uses more than a third of the relay's CPU time. clickhouse-client does not
// compress for local servers either
// (https://github.com/ClickHouse/ClickHouse/blob/v25.8.1.5101-lts/src/Client/ConnectionParameters.cpp).
func isRemote(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	return host != "localhost" && !net.ParseIP(host).IsLoopback()
}

func isSet(settings chgo.Settings, name string) bool {
	value, ok := settings[name]
	return ok && fmt.Sprint(value) != "0"
}

// supportedScheme refuses unknown schemes, because clickhouse-go would use the native
// protocol for them.
func supportedScheme(dsn string) bool {
	scheme, _, _ := strings.Cut(dsn, "://")
	switch scheme {
	case "clickhouse", "tcp", "http", "https":
		return true
	default:
		return false
	}
}

// dialer dials for the native protocol. The driver's dialer ignores the context.
func dialer(d *chgo.Options) func(ctx context.Context, address string) (net.Conn, error) {
	plain := &net.Dialer{Timeout: d.DialTimeout}
	if d.TLS != nil {
		secure := &tls.Dialer{NetDialer: plain, Config: d.TLS}
		return func(ctx context.Context, address string) (net.Conn, error) {
			return secure.DialContext(ctx, "tcp", address)
		}
	}
	return func(ctx context.Context, address string) (net.Conn, error) {
		return plain.DialContext(ctx, "tcp", address)
	}
}

// closing closes the connection if the handshake fails. The driver leaves that to the
// garbage collector
// (https://github.com/ClickHouse/clickhouse-go/blob/v2.50.0/conn.go#L99).
func closing(dial chgo.Dial) chgo.Dial {
	return func(ctx context.Context, address string, opt *chgo.Options) (chgo.DialResult, error) {
		if opt.DialContext == nil { // HTTP
			return dial(ctx, address, opt)
		}
		var dialed net.Conn
		o := *opt
		o.DialContext = func(ctx context.Context, address string) (net.Conn, error) {
			var err error
			dialed, err = opt.DialContext(ctx, address)
			return dialed, err //nolint:wrapcheck // the driver adds the operation
		}
		result, err := dial(ctx, address, &o)
		if err != nil && dialed != nil {
			_ = dialed.Close()
		}
		return result, err
	}
}

// responses refuses HTTP responses that do not come from ClickHouse. The driver accepts
// every 200 as an acknowledgement, and follows redirects with a GET request without a
// body. Without this check, the login page of a proxy would acknowledge a batch.
type responses struct{ *http.Transport }

// RoundTrip implements http.RoundTripper.
func (r responses) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := r.Transport.RoundTrip(request)
	if err != nil {
		return nil, err //nolint:wrapcheck // the driver's error, passed through
	}
	switch {
	case response.StatusCode >= 300 && response.StatusCode < 400:
		err = fmt.Errorf("the response is a redirect (%s), which an insert cannot follow", response.Status)
	case response.StatusCode == http.StatusOK && !fromClickHouse(response.Header):
		err = errors.New("the response is not from clickhouse: it has no X-ClickHouse- header")
	default:
		return response, nil
	}
	_ = response.Body.Close()
	return nil, foreignResponseError{err}
}

func fromClickHouse(header http.Header) bool {
	for name := range header {
		if strings.HasPrefix(name, "X-Clickhouse-") {
			return true
		}
	}
	return false
}

// foreignResponseError says that a proxy has responded instead of ClickHouse.
type foreignResponseError struct{ error }

// quoteIdentifier quotes a name without backticks.
func quoteIdentifier(name string) string { return "`" + name + "`" }

// quoteString returns a string literal.
func quoteString(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}

// withoutURL removes the URL from an HTTP client's error. The URL contains the complete
// statement and its settings.
func withoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}
