// Package clickhouse is the sink that delivers events to ClickHouse.
//
// It works over both of ClickHouse's protocols, with any DSN of clickhouse-go,
// and leans on four things: an insert's deduplication token, one block for an
// insert, system.processes and reading back what is there. Open sets what the
// driver leaves open, Check verifies what the server has to bring.
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
	"sync/atomic"
	"time"

	chgo "github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Defaults of Options and of what a DSN leaves out.
const (
	DefaultTable        = "event_log"
	DefaultMaxOpenConns = 10

	// defaultDialTimeout bounds the dial and the handshake, and the wait for a
	// free connection.
	defaultDialTimeout = 5 * time.Second
	// defaultReadTimeout is far above every deadline: deadlines come with the
	// contexts. The driver's own, 5 minutes, would end a longer flush.
	defaultReadTimeout = time.Hour
)

// Options say where the events go.
type Options struct {
	// DSN is any that clickhouse-go understands: clickhouse://, tcp://, http://,
	// and https:// with secure=true. What it sets wins over the defaults
	// (compression is LZ4, or none to a server on this machine, unless it says
	// otherwise: compress=none, compress=lz4), but not over the settings that an
	// insert depends on.
	//
	// Several hosts must be replicas of one shard of Cluster.
	DSN string
	// Table is the table's name in the DSN's database: letters, digits and
	// underscores. Empty means DefaultTable.
	Table string
	// Cluster is the name of the cluster that replicates the table. Empty means
	// a single server.
	Cluster string
	// MaxOpenConns bounds the connections of inserts, and those of everything else,
	// where the DSN does not. Each insert that is under way holds one, and Running,
	// Present and Ping need one. 0 means DefaultMaxOpenConns.
	MaxOpenConns int
}

// Sink delivers events to a ClickHouse table. It is safe for concurrent use.
type Sink struct {
	conn driver.Conn
	// inserts are the connections of inserts up to keptBytes. They keep the memory
	// that they have encoded one in for the next, which conn's do not.
	inserts driver.Conn

	table   string // as it stands in a statement
	name    string
	cluster string
	http    bool
	// readonly says that the DSN asks for it.
	readonly bool
	// database and user as the DSN names them, for messages.
	database, user string

	// dials counts the connections made: a new one may lead to a server that
	// was upgraded.
	dials    *atomic.Uint64
	optional atomic.Pointer[optionalSettings]
}

var _ sink.Sink = (*Sink)(nil)

// Check returns an error where the options are malformed. It holds no password.
func (o Options) Check() error {
	_, _, err := parse(o)
	return err
}

// Open prepares a sink. It does not connect: an error means that the options
// are malformed, and holds no password.
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
		readonly: asksFor(driverOptions.Settings, "readonly"),
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

// Ping asks the server for an answer.
func (s *Sink) Ping(ctx context.Context) error {
	// Not the driver's own Ping, which hears of the context's end by its
	// deadline only.
	var one uint8
	if err := s.conn.QueryRow(ctx, "SELECT 1").Scan(&one); err != nil {
		return s.classify(ctx, "ping", err)
	}
	return nil
}

// Close closes the connections that are idle, and each other one when it is
// done.
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

// parse completes the options, and makes the driver's of them.
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
		// An insert may go to one of the hosts and the question whether it
		// arrived to another.
		return o, nil, errors.New("clickhouse dsn: several hosts need the name of the cluster that they are replicas in")
	}

	d.DialTimeout = cmp.Or(d.DialTimeout, defaultDialTimeout)
	d.ReadTimeout = cmp.Or(d.ReadTimeout, defaultReadTimeout)
	d.MaxOpenConns = cmp.Or(d.MaxOpenConns, o.MaxOpenConns, DefaultMaxOpenConns)
	d.MaxIdleConns = cmp.Or(d.MaxIdleConns, d.MaxOpenConns)
	// An idle connection does not keep the memory of a large batch that it has
	// sent.
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

// isRemote reports whether a host:port is not on this machine. To compress what
// goes no further costs more than a third of the relay's CPU, and clickhouse-client
// does not either
// (https://github.com/ClickHouse/ClickHouse/blob/v25.8.1.5101-lts/src/Client/ConnectionParameters.cpp).
func isRemote(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	return host != "localhost" && !net.ParseIP(host).IsLoopback()
}

func asksFor(settings chgo.Settings, name string) bool {
	value, ok := settings[name]
	return ok && fmt.Sprint(value) != "0"
}

// supportedScheme tells what clickhouse-go does not: it takes any scheme that it
// does not know for its native protocol.
func supportedScheme(dsn string) bool {
	scheme, _, _ := strings.Cut(dsn, "://")
	switch scheme {
	case "clickhouse", "tcp", "http", "https":
		return true
	default:
		return false
	}
}

// dialer dials for the native protocol: the driver's own does not end with the
// context.
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

// closing closes what was dialed where the handshake fails, which the driver
// leaves to the garbage collector
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
			return dialed, err //nolint:wrapcheck // the driver says what it was doing
		}
		result, err := dial(ctx, address, &o)
		if err != nil && dialed != nil {
			_ = dialed.Close()
		}
		return result, err
	}
}

// answers refuses HTTP answers that are not ClickHouse's own. The driver takes
// every 200 for an acknowledgement, and follows redirects as GET without the
// body: a proxy's login page would acknowledge a batch.
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
		err = errors.New("answered by something that is not clickhouse: no X-ClickHouse- header")
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

// foreignAnswerError says that something between the relay and ClickHouse
// answered.
type foreignAnswerError struct{ error }

// quoteIdentifier quotes a name of which tableName has approved.
func quoteIdentifier(name string) string { return "`" + name + "`" }

// quoteString makes a string literal.
func quoteString(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(s) + "'"
}

// withoutURL strips from an HTTP client's error the URL, which repeats the whole
// statement and its settings.
func withoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}
