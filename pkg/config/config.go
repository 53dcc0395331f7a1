// Package config reads the configuration of the programs: a file, over it the
// environment, over it flags, checked and put into one plain struct for each
// program.
package config

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/telemetry"
)

// API is the configuration of the API.
type API struct {
	Environment string
	Postgres    Postgres
	API         Access
	HTTP        HTTP
	Outbox      Outbox
	Admin       Admin
	Sentry      Sentry
	Log         Log
}

// Relay is the configuration of the relay.
type Relay struct {
	Environment string
	Postgres    Postgres
	ClickHouse  ClickHouse
	Relay       Delivery
	Admin       Admin
	Sentry      Sentry
	Log         Log
}

// Postgres is how PostgreSQL is reached.
type Postgres struct {
	DSN          string
	Schema       string
	MaxOpenConns int
}

// ClickHouse is how ClickHouse is reached, and where events go.
type ClickHouse struct {
	DSN     string
	Table   string
	Cluster string
}

// Access is who may use the API.
type Access struct {
	Keys []APIKey
	// Auth is on, or off: then everybody may.
	Auth string
}

// AuthOff is the value of Access.Auth that serves everybody.
const AuthOff = "off"

// APIKey is a client's key: its name, and the SHA-256 of it.
type APIKey struct {
	Name   string
	Digest [sha256.Size]byte
}

// HTTP is the API's server.
type HTTP struct {
	TrustedProxies    []netip.Prefix
	RatePerKey        float64
	RatePerAddress    float64
	MaxConcurrent     int
	Addr              string
	MaxBodyBytes      int64
	ReadHeaderTimeout time.Duration
	ReadTimeout       time.Duration
	RequestTimeout    time.Duration
	WriteTimeout      time.Duration
	IdleTimeout       time.Duration
	ShutdownTimeout   time.Duration
	IdempotencyTTL    time.Duration
}

// Outbox is what may be published.
type Outbox struct {
	MaxEventBytes int64
}

// Delivery is how the relay works.
type Delivery struct {
	Workers         int
	BatchMaxRows    int
	BatchMaxBytes   int64
	Linger          time.Duration
	PollInterval    time.Duration
	FlushTimeout    time.Duration
	ShutdownTimeout time.Duration
	BackoffMin      time.Duration
	BackoffMax      time.Duration
}

// Admin is the operators' port.
type Admin struct {
	Addr string
}

// Sentry is where errors and transactions are reported to.
type Sentry struct {
	DSN              string
	TracesSampleRate float64
}

// Log is how log records are written.
type Log struct {
	Level  string
	Format string
}

const (
	kib = 1 << 10
	mib = 1 << 20

	// maxBlockRows is what ClickHouse takes in one block whatever its settings
	// (max_insert_block_size), less the most that it rounds up by.
	maxBlockRows = 1_048_448
	// maxBlockBytes is where ClickHouse begins to cut a block in two
	// (min_insert_block_size_bytes).
	maxBlockBytes = 256 * mib
)

func (c *API) keys() []key {
	keys := []key{environmentKey(&c.Environment)}
	keys = append(keys, c.Postgres.keys("20", 2,
		"Most connections to PostgreSQL; what more requests need waits for one.")...)
	keys = append(keys,
		secret(maskAPIKeys, list("api.keys", &c.API.Keys, parseAPIKey, formatAPIKey,
			"Keys that clients may use: SHA-256 digests in hex, comma-separated, each as NAME:DIGEST or alone.")),
		text("api.auth", &c.API.Auth, "on", "on, or off: then everybody may use the API.", isAuth),
		address("http.addr", &c.HTTP.Addr, "127.0.0.1:8080",
			"Address that the API listens on; port 0 picks a free one, which the log names."),
		list("http.trusted_proxies", &c.HTTP.TrustedProxies, parseNetwork, netip.Prefix.String,
			"Networks, comma-separated, whose X-Forwarded-For tells a client's address."),
		number("http.rate_limit_per_key", &c.HTTP.RatePerKey, "0", 0, maxRate,
			"Requests a second with one API key, ten seconds' worth at once; 0 is no limit."),
		number("http.rate_limit_per_address", &c.HTTP.RatePerAddress, "0", 0, maxRate,
			"Requests a second from one address, ten seconds' worth at once; 0 is no limit."),
		integer("http.max_concurrent_requests", &c.HTTP.MaxConcurrent, "100", 1, 100_000,
			"Requests that work with PostgreSQL at once or wait for a connection; more are turned away."),
		size("http.max_body_bytes", &c.HTTP.MaxBodyBytes, "16MiB", 1*kib, 128*mib,
			"Largest request body."),
		duration("http.read_header_timeout", &c.HTTP.ReadHeaderTimeout, "5s", 100*time.Millisecond, 5*time.Minute,
			"Time for a request's headers to arrive."),
		duration("http.read_timeout", &c.HTTP.ReadTimeout, "10s", 100*time.Millisecond, 10*time.Minute,
			"Time for a request's headers and body to arrive."),
		duration("http.request_timeout", &c.HTTP.RequestTimeout, "15s", 100*time.Millisecond, 10*time.Minute,
			"Time to work on a request, from the end of its headers; PostgreSQL stops with it."),
		duration("http.write_timeout", &c.HTTP.WriteTimeout, "20s", 100*time.Millisecond, 15*time.Minute,
			"Time from the end of a request's headers to the end of the answer; longer than http.request_timeout."),
		duration("http.idle_timeout", &c.HTTP.IdleTimeout, "2m", time.Second, time.Hour,
			"How long an idle connection is kept for the next request."),
		duration("http.shutdown_timeout", &c.HTTP.ShutdownTimeout, "20s", 10*time.Millisecond, 10*time.Minute,
			"Time that requests in flight get when the API is told to stop."),
		duration("http.idempotency_ttl", &c.HTTP.IdempotencyTTL, "24h", time.Minute, 30*24*time.Hour,
			"How long the answer to a request with an Idempotency-Key is kept for its repetitions."),
		size("outbox.max_event_bytes", &c.Outbox.MaxEventBytes, "16MiB", 1*kib, 128*mib,
			"Largest event_context that may be published."),
		address("admin.addr", &c.Admin.Addr, "127.0.0.1:9090", adminUsage),
	)
	keys = append(keys, c.Sentry.keys()...)
	return append(keys, c.Log.keys()...)
}

func (c *API) check() error {
	if c.HTTP.WriteTimeout <= c.HTTP.RequestTimeout {
		return problem("http.write_timeout", "has to be longer than http.request_timeout (%s)", c.HTTP.RequestTimeout)
	}
	return nil
}

func (c *Relay) keys() []key {
	keys := []key{environmentKey(&c.Environment)}
	keys = append(keys, c.Postgres.keys("0", 0,
		"Most connections to PostgreSQL; 0 is as many as the workers can use at once.")...)
	keys = append(keys,
		required(secret(maskDSN, text("clickhouse.dsn", &c.ClickHouse.DSN, "",
			"ClickHouse: clickhouse://USER:PASSWORD@HOST:9000/DATABASE, or http(s)://….", isClickHouseDSN))),
		text("clickhouse.table", &c.ClickHouse.Table, "event_log",
			"Table that events go to, in the DSN's database.", isTable),
		text("clickhouse.cluster", &c.ClickHouse.Cluster, "",
			"Cluster that the table is replicated on; empty for a single server.", isCluster),
		integer("relay.workers", &c.Relay.Workers, "2", 1, 64,
			"Batches that one process sends at once."),
		integer("relay.batch_max_rows", &c.Relay.BatchMaxRows, "50000", 1, maxBlockRows,
			"Most events in one batch, which is one insert."),
		size("relay.batch_max_bytes", &c.Relay.BatchMaxBytes, "32MiB", 1*kib, maxBlockBytes-1,
			"Most bytes in all batches that one process holds in memory at once. One batch takes half of them at most, so that "+
				"one is read while another is sent; a larger event goes alone."),
		duration("relay.linger", &c.Relay.Linger, "250ms", time.Millisecond, time.Minute,
			"Least time between two batches that are not full, of all relays together."),
		duration("relay.poll_interval", &c.Relay.PollInterval, "5s", 10*time.Millisecond, 10*time.Minute,
			"How often an idle relay looks for events that nothing told it of."),
		duration("relay.flush_timeout", &c.Relay.FlushTimeout, "30s", time.Second, 10*time.Minute,
			"Time for one insert; ClickHouse stops with it."),
		duration("relay.shutdown_timeout", &c.Relay.ShutdownTimeout, "35s", 10*time.Millisecond, 15*time.Minute,
			"Time that batches in flight get when the relay is told to stop; then they are released."),
		duration("relay.backoff_min", &c.Relay.BackoffMin, "500ms", 10*time.Millisecond, time.Minute,
			"Pause after the first failure; it doubles with each further one."),
		duration("relay.backoff_max", &c.Relay.BackoffMax, "30s", 10*time.Millisecond, time.Hour,
			"Longest pause after failures."),
		address("admin.addr", &c.Admin.Addr, "127.0.0.1:9091", adminUsage),
	)
	keys = append(keys, c.Sentry.keys()...)
	return append(keys, c.Log.keys()...)
}

func (c *Relay) check() error {
	if c.Relay.BackoffMax < c.Relay.BackoffMin {
		return problem("relay.backoff_max", "is shorter than relay.backoff_min (%s)", c.Relay.BackoffMin)
	}
	return nil
}

const adminUsage = "Address of the operators' port: /livez, /readyz, /metrics; port 0 picks a free one, which the log names."

func environmentKey(value *string) key {
	return text("environment", value, "Local",
		"Name of the deployment: a column of every event, and Sentry's environment.", isEnvironment)
}

func (c *Postgres) keys(maxOpenConns string, least int, usage string) []key {
	return []key{
		required(secret(maskDSN, text("postgres.dsn", &c.DSN, "",
			"PostgreSQL: postgres://USER:PASSWORD@HOST:5432/DATABASE, or key=value pairs.", isPostgresDSN))),
		text("postgres.schema", &c.Schema, "",
			"Schema of Diehard's tables; empty is the first of the session's search_path.", isSchema),
		integer("postgres.max_open_conns", &c.MaxOpenConns, maxOpenConns, least, 10_000, usage),
	}
}

func (c *Sentry) keys() []key {
	return []key{
		secret(maskSentryDSN, text("sentry.dsn", &c.DSN, "",
			"Sentry project that errors and transactions are reported to; empty is none.", isSentryDSN)),
		fraction("sentry.traces_sample_rate", &c.TracesSampleRate, "1",
			"Share of requests and batches that are reported as transactions."),
	}
}

func (c *Log) keys() []key {
	return []key{
		text("log.level", &c.Level, "info", "Least level that is logged: debug, info, warn, error.", isLevel),
		text("log.format", &c.Format, "json", "json or text.", isFormat),
	}
}

// CheckAccess returns an error where nobody may use the API. Only serving needs
// what it asks for.
func (c *API) CheckAccess() error {
	if len(c.API.Keys) == 0 && c.API.Auth != AuthOff {
		return problem("api.keys", "is empty: set it to SHA-256 digests of API keys (printf %%s KEY | sha256sum), "+
			"or api.auth to off, which serves everybody")
	}
	return nil
}

// maxRate bounds a rate limit: what is above is none.
const maxRate = 1_000_000

func isAuth(value string) error {
	if value != "on" && value != AuthOff {
		return fmt.Errorf("is %q, which is none of on, off", value)
	}
	return nil
}

var apiKeyName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// namelessDigits is how many digits of a digest stand for a key without a name.
const namelessDigits = 8

// parseAPIKey reads NAME:DIGEST, or a digest alone, whose first digits name it
// then.
func parseAPIKey(text string, others []APIKey) (key APIKey, err error) {
	name, digest, named := strings.Cut(text, ":")
	if !named {
		digest = name
	}
	decoded, err := hex.DecodeString(digest)
	if err != nil || len(decoded) != len(key.Digest) {
		return APIKey{}, errors.New("has a digest that is no SHA-256 in hex, 64 digits") // not quoted: it may be a key
	}
	if !named {
		name = "key-" + digest[:namelessDigits]
	}
	if !apiKeyName.MatchString(name) {
		return APIKey{}, fmt.Errorf("has the name %q: letters, digits and . _ -, at most 64", name)
	}
	key = APIKey{Name: name, Digest: [sha256.Size]byte(decoded)}
	for _, other := range others {
		if other.Name == key.Name {
			return APIKey{}, fmt.Errorf("has the name %s twice", name)
		}
		if other.Digest == key.Digest {
			return APIKey{}, fmt.Errorf("has one key as %s and %s", other.Name, name)
		}
	}
	return key, nil
}

func formatAPIKey(key APIKey) string { return key.Name + ":" + hex.EncodeToString(key.Digest[:]) }

func parseNetwork(text string, _ []netip.Prefix) (netip.Prefix, error) {
	if address, err := netip.ParseAddr(text); err == nil {
		return address.Prefix(address.BitLen()) //nolint:wrapcheck // never fails
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil || prefix != prefix.Masked() {
		return netip.Prefix{}, fmt.Errorf("has %q, which is no network such as 10.0.0.0/8 or 2001:db8::/32", text)
	}
	return prefix, nil
}

// maxEnvironmentBytes is the outbox's own bound.
const maxEnvironmentBytes = 128

func isEnvironment(value string) error {
	switch {
	case value == "":
		return errors.New("is empty")
	case len(value) > maxEnvironmentBytes:
		return fmt.Errorf("is longer than %d bytes", maxEnvironmentBytes)
	case !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' }):
		return errors.New("is not plain text")
	}
	return nil
}

func isPostgresDSN(value string) error {
	if value == "" {
		return nil
	}
	if err := postgres.CheckDSN(value); err != nil {
		return fmt.Errorf("is %w", err)
	}
	return nil
}

// maxIdentifierBytes is PostgreSQL's: it would cut a longer name off.
const maxIdentifierBytes = 63

func isSchema(value string) error {
	switch {
	case len(value) > maxIdentifierBytes:
		return fmt.Errorf("is longer than %d bytes", maxIdentifierBytes)
	case !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' }):
		return errors.New("is not plain text")
	case strings.HasPrefix(value, "pg_") || value == "information_schema":
		return fmt.Errorf("is %q, which PostgreSQL keeps for itself", value)
	}
	return nil
}

var clickHouseDSN = regexp.MustCompile(`^(clickhouse|tcp|https?)://[^/?#]`)

// isClickHouseDSN knows what such a DSN looks like; only the sink knows more.
func isClickHouseDSN(value string) error {
	if value != "" && !clickHouseDSN.MatchString(value) {
		return errors.New("is not a ClickHouse DSN: it begins with clickhouse://HOST, http://HOST or https://HOST")
	}
	return nil
}

var (
	table   = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	cluster = regexp.MustCompile(`^[A-Za-z0-9_{}.-]*$`)
)

func isTable(value string) error {
	if !table.MatchString(value) {
		return fmt.Errorf("is %q, which is no table's name: letters, digits and _, no digit first", value)
	}
	return nil
}

func isCluster(value string) error {
	if !cluster.MatchString(value) {
		return fmt.Errorf("is %q, which is no cluster's name: letters, digits and _ - . { }", value)
	}
	return nil
}

func isAddress(value string) error {
	_, port, err := net.SplitHostPort(value)
	if err != nil {
		return fmt.Errorf("is %q, which is not HOST:PORT", value)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("is %q, whose port is not a number from 0 to 65535", value)
	}
	return nil
}

func isSentryDSN(value string) error {
	if value == "" {
		return nil
	}
	if err := telemetry.CheckSentryDSN(value); err != nil {
		return fmt.Errorf("is %w", err)
	}
	return nil
}

func isLevel(value string) error {
	if _, err := telemetry.ParseLevel(value); err != nil {
		return fmt.Errorf("is %w", err)
	}
	return nil
}

func isFormat(value string) error {
	if value != string(telemetry.JSON) && value != string(telemetry.Text) {
		return fmt.Errorf("is %q, which is none of json, text", value)
	}
	return nil
}
