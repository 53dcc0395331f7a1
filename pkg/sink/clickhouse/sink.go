// Package clickhouse is the sink that delivers events to ClickHouse.
//
// It supports both protocols of ClickHouse and any DSN of clickhouse-go. It relies on
// the deduplication token of an insert, one block for an insert, system.processes, and
// reading the rows back. Open sets the driver's options, and Check verifies the server's
// settings.
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
	"strings"
	"sync"
	"sync/atomic"
	"time"

	chgo "github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Defaults of Options and of a DSN.
const (
	DefaultTable        = "event_log"
	DefaultMaxOpenConns = 10

	// defaultDialTimeout bounds the dial with its handshake, and the wait for a free
	// connection.
	defaultDialTimeout = 5 * time.Second
	// defaultReadTimeout is above every deadline. Contexts carry the deadlines. The
	// driver's default of 5 minutes would end a longer insert.
	defaultReadTimeout = time.Hour
)

// Options configure a Sink.
type Options struct {
	// DSN is a DSN of clickhouse-go: clickhouse://, tcp://, http://, or https:// with
	// secure=true. It overrides the defaults, but not the settings that inserts depend
	// on. The default compression is LZ4, or none to a server on this machine. The DSN
	// changes it by compress=none or compress=lz4.
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
	// connections, unless the DSN does. Each insert holds one, and each call of
	// InFlight, Present, Check and Ping needs one. 0 means DefaultMaxOpenConns.
	MaxOpenConns int
}

// Sink delivers events to a ClickHouse table. It is safe for concurrent use.
type Sink struct {
	conn driver.Conn
	// inserts are the connections of inserts up to keptBytes. Other than those of conn,
	// they keep the memory of an encoded insert for the next one.
	inserts driver.Conn

	table   string // quoted
	name    string
	cluster string
	http    bool
	// readonly says that the DSN sets readonly.
	readonly bool
	// database and user are the DSN's, for messages.
	database, user string

	// dials counts the connections that were made. A new one may reach a server that
	// was upgraded.
	dials    *atomic.Uint64
	optional atomic.Pointer[optionalSettings]

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
		table:    quoteIdentifier(o.Table),
		name:     o.Table,
		cluster:  o.Cluster,
		http:     driverOptions.Protocol == chgo.HTTP,
		readonly: isSet(driverOptions.Settings, "readonly"),
		database: driverOptions.Auth.Database,
		user:     cmp.Or(driverOptions.Auth.Username, "default"),
		dials:    new(atomic.Uint64),
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

// Ping implements sink.Sink.
func (s *Sink) Ping(ctx context.Context) error {
	// The driver's Ping ignores a context that is cancelled.
	var one uint8
	if err := s.conn.QueryRow(ctx, "SELECT 1").Scan(&one); err != nil {
		return s.classify(ctx, "ping", err)
	}
	return nil
}

// Close closes idle connections at once, and busy ones when they are released.
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
	switch {
	case !supportedScheme(o.DSN):
		return o, nil, errors.New("clickhouse dsn: the scheme must be clickhouse, tcp, http or https")
	case !tableName.MatchString(o.Table):
		return o, nil, fmt.Errorf("clickhouse table %q: only letters, digits and underscores are allowed", o.Table)
	case o.Cluster != "" && !clusterName.MatchString(o.Cluster):
		return o, nil, fmt.Errorf("clickhouse cluster %q: only letters, digits and _ - . { } are allowed", o.Cluster)
	case len(d.Addr) > 1 && o.Cluster == "":
		// An insert may use one of the hosts and its presence check another.
		return o, nil, errors.New("clickhouse dsn: several hosts need the name of the cluster that they are replicas in")
	}

	d.DialTimeout = cmp.Or(d.DialTimeout, defaultDialTimeout)
	d.ReadTimeout = cmp.Or(d.ReadTimeout, defaultReadTimeout)
	d.MaxOpenConns = cmp.Or(d.MaxOpenConns, o.MaxOpenConns, DefaultMaxOpenConns)
	d.MaxIdleConns = cmp.Or(d.MaxIdleConns, d.MaxOpenConns)
	// An idle connection does not keep the memory of a large batch.
	d.FreeBufOnConnRelease = true
	if d.Compression == nil && slices.ContainsFunc(d.Addr, isRemote) {
		d.Compression = &chgo.Compression{Method: chgo.CompressionLZ4}
	}
	if d.Protocol == chgo.HTTP {
		d.TransportFunc = func(t *http.Transport) (http.RoundTripper, error) { return answers{t}, nil }
	} else {
		d.DialContext = dialer(d)
	}
	return o, d, nil
}

// isRemote returns whether a host:port is on another machine. Compression for a local
// server costs more than a third of the relay's CPU, and clickhouse-client does not
// compress for it either
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

// supportedScheme refuses unknown schemes, which clickhouse-go would treat as its native
// protocol.
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

// closing closes the connection if the handshake fails, which the driver leaves to the
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

// answers refuses HTTP answers that do not come from ClickHouse. The driver accepts every
// 200 as an acknowledgement, and follows redirects as GET without the body, so the login
// page of a proxy would acknowledge a batch.
type answers struct{ *http.Transport }

// RoundTrip implements http.RoundTripper.
func (a answers) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := a.Transport.RoundTrip(request)
	if err != nil {
		return nil, err //nolint:wrapcheck // the driver's error, passed through
	}
	switch {
	case response.StatusCode >= 300 && response.StatusCode < 400:
		err = fmt.Errorf("answered with a redirect (%s), which an insert cannot follow", response.Status)
	case response.StatusCode == http.StatusOK && !fromClickHouse(response.Header):
		err = errors.New("the answer is not from clickhouse: it has no X-ClickHouse- header")
	default:
		return response, nil
	}
	_ = response.Body.Close()
	return nil, foreignAnswerError{err}
}

func fromClickHouse(header http.Header) bool {
	for name := range header {
		if strings.HasPrefix(name, "X-Clickhouse-") {
			return true
		}
	}
	return false
}

// foreignAnswerError says that a proxy answered instead of ClickHouse.
type foreignAnswerError struct{ error }

// quoteIdentifier quotes a name without backticks.
func quoteIdentifier(name string) string { return "`" + name + "`" }

// quoteString returns a string literal.
func quoteString(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}

// withoutURL removes the URL from an HTTP client's error. It contains the whole
// statement and its settings.
func withoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}
