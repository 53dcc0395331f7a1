// Package config reads and validates the configuration of the programs, one struct per
// program. Flags override environment variables. Environment variables override the
// file, and the file overrides the defaults.
package config

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/diehard-outbox/diehard/pkg/httpapi/scope"
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

	Housekeeping Housekeeping
	Outbox       Outbox

	Admin  Admin
	Sentry Sentry
	Log    Log
}

// Postgres is the configuration of the connections to PostgreSQL.
type Postgres struct {
	DSN          string
	PasswordFile string
	Schema       string
	MaxOpenConns int
	// ListenDSN is the address for LISTEN, or empty for DSN. The API does not listen.
	ListenDSN string
	// History is HistoryChecked or HistoryLossless. The API does not use it.
	History string
}

// The values of Postgres.History.
const (
	HistoryChecked  = "checked"  // a failover is a change of history
	HistoryLossless = "lossless" // no failover loses a commit
)

// ClickHouse is the configuration of the connections to ClickHouse and of the table.
type ClickHouse struct {
	DSN     string
	Table   string
	Cluster string
}

// Access is the authentication of the API's clients.
type Access struct {
	Keys []APIKey
	// Auth is "on" or Off.
	Auth string
}

// Off is the value of a key that is on or off.
const Off = "off"

// APIKey is the SHA-256 digest of a client's key.
type APIKey struct {
	Client string
	// Name distinguishes the keys of the client.
	Name   string
	Digest [sha256.Size]byte
	// Scopes are the rights of the key; empty means all rights.
	Scopes []string
}

// HTTP is the configuration of the API's server.
type HTTP struct {
	TrustedProxies    []netip.Prefix
	RatePerKey        float64
	RatePerAddress    float64
	MaxConcurrent     int
	Addr              string
	MaxBodyBytes      int64
	BodyBudget        int64
	Docs              string
	LogAddresses      string
	ReadHeaderTimeout time.Duration
	ReadTimeout       time.Duration
	RequestTimeout    time.Duration
	WriteTimeout      time.Duration
	IdleTimeout       time.Duration
	DrainDelay        time.Duration
	ShutdownTimeout   time.Duration
	IdempotencyTTL    time.Duration
}

// Outbox limits the events that clients publish.
type Outbox struct {
	MaxEventBytes int64
	// MaxBacklogBytes is the size of the waiting events at which the API refuses requests;
	// 0 means no limit. The relay only shows it. FullRefuses is RefuseEvents or RefuseChanges.
	MaxBacklogBytes int64
	FullRefuses     string
}

// The requests that the API refuses while the outbox is full.
const (
	RefuseEvents  = "events"  // POST /v1/events and /v1/events/batch
	RefuseChanges = "changes" // these, and all changes of users
)

// Delivery is the configuration of the relay's workers and batches.
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

	DeadLetterAttempts int
	DeadLetterAfter    time.Duration
	DeadLettersPerHour int
}

// Housekeeping is the configuration of the fleet's housekeeping. A retention of 0 keeps
// the rows.
type Housekeeping struct {
	// Vacuum is "on" or Off.
	Vacuum              string
	DeadLetterRetention time.Duration
	AuditRetention      time.Duration
}

// Admin is the configuration of the operators' port.
type Admin struct {
	Addr string
	// Token is what operators log in to the relay's page with. Without it, the page exists
	// only if Addr is a loopback address. The API has no page.
	Token string
}

// Sentry is the configuration of reports to Sentry.
type Sentry struct {
	DSN              string
	TracesSampleRate float64
}

// Log is the configuration of the log.
type Log struct {
	Level  string
	Format string
}

const (
	kib = 1 << 10
	mib = 1 << 20

	// bodyEnvelope is the size of a body without its event_context.
	bodyEnvelope = 64 * kib

	// maxBlockRows is the maximum number of rows that ClickHouse does not split into
	// two blocks. It is below the default of max_insert_block_size.
	maxBlockRows = 1_048_448
	// maxBlockBytes is the size at which ClickHouse splits a block
	// (min_insert_block_size_bytes).
	maxBlockBytes = 256 * mib
)

func (c *API) keys() []key {
	keys := []key{environmentKey(&c.Environment)}
	keys = append(keys, c.Postgres.keys("20", 2,
		"Maximum connections to PostgreSQL; further requests wait for a free connection.")...)
	keys = append(keys,
		secret(maskAPIKeys, list("api.keys", &c.API.Keys, parseAPIKey, formatAPIKey,
			"API keys of the clients, comma-separated: DIGEST, CLIENT:DIGEST or CLIENT/KEY:DIGEST, with the SHA-256 digest of the key in hex. "+
				"A key with scopes has no other rights: CLIENT:DIGEST:users.read+users.write+events.publish.")),
		text("api.auth", &c.API.Auth, "on", "Authentication by API key: on or off.", isOnOrOff),
		address("http.addr", &c.HTTP.Addr, "127.0.0.1:8080",
			"Listen address of the API; port 0 picks a free port and logs it."),
		list("http.trusted_proxies", &c.HTTP.TrustedProxies, parseNetwork, netip.Prefix.String,
			"Networks of trusted proxies, comma-separated; X-Forwarded-For from other addresses is ignored."),
		number("http.rate_limit_per_key", &c.HTTP.RatePerKey, "0", 0, maxRate,
			"Requests per second for each API key, with bursts of ten times the rate; 0 means no limit."),
		number("http.rate_limit_per_address", &c.HTTP.RatePerAddress, "0", 0, maxRate,
			"Requests per second from each address, with bursts of ten times the rate; 0 means no limit."),
		integer("http.max_concurrent_requests", &c.HTTP.MaxConcurrent, "100", 1, 100_000,
			"Maximum requests that use PostgreSQL or wait for a connection; further requests wait for up to a second, or are shed."),
		size("http.max_body_bytes", &c.HTTP.MaxBodyBytes, "0", 0, 256*mib,
			"Maximum size of a request body; 0 means 64 KiB more than outbox.max_event_bytes."),
		size("http.body_budget", &c.HTTP.BodyBudget, "0", 0, 4096*mib,
			"Maximum size of all request bodies that one process holds at a time; the API sheds further requests. "+
				"0 means twice http.max_body_bytes, but at least 1 MiB."),
		text("http.docs", &c.HTTP.Docs, "on", "The page /docs, which shows the OpenAPI document: on or off.", isOnOrOff),
		text("http.log_addresses", &c.HTTP.LogAddresses, "on", "The clients' addresses in the log of requests: on or off.", isOnOrOff),
		duration("http.read_header_timeout", &c.HTTP.ReadHeaderTimeout, "5s", 100*time.Millisecond, 5*time.Minute,
			"Time limit for reading the headers of a request."),
		duration("http.read_timeout", &c.HTTP.ReadTimeout, "10s", 100*time.Millisecond, 10*time.Minute,
			"Time limit for reading the headers and the body of a request."),
		duration("http.request_timeout", &c.HTTP.RequestTimeout, "15s", 100*time.Millisecond, 10*time.Minute,
			"Time limit for processing a request, from the end of its headers; it also cancels statements in PostgreSQL."),
		duration("http.write_timeout", &c.HTTP.WriteTimeout, "20s", 100*time.Millisecond, 15*time.Minute,
			"Time limit from the end of a request's headers to the end of the response; must be longer than http.request_timeout."),
		duration("http.idle_timeout", &c.HTTP.IdleTimeout, "2m", time.Second, time.Hour,
			"How long an idle connection is kept open."),
		duration("http.drain_delay", &c.HTTP.DrainDelay, "5s", 0, 10*time.Minute,
			"How long a stopping API reports not ready and still accepts connections, until load balancers have noticed."),
		duration("http.shutdown_timeout", &c.HTTP.ShutdownTimeout, "20s", 10*time.Millisecond, 10*time.Minute,
			"Time limit for requests in flight when the API stops."),
		duration("http.idempotency_ttl", &c.HTTP.IdempotencyTTL, "24h", time.Minute, 30*24*time.Hour,
			"How long the response to a request with an Idempotency-Key is kept for retries."),
		size("outbox.max_event_bytes", &c.Outbox.MaxEventBytes, "16MiB", 1*kib, 128*mib,
			"Maximum size of an event_context."),
		size("outbox.max_backlog_bytes", &c.Outbox.MaxBacklogBytes, "0", 0, maxBacklog,
			"Size of the waiting events at which the API publishes no more; 0 means no limit."),
		text("outbox.full_refuses", &c.Outbox.FullRefuses, RefuseEvents,
			"What the API refuses then: events, or changes, which includes changes of users.", isRefusal),
		address("admin.addr", &c.Admin.Addr, "127.0.0.1:9090", adminUsage),
	)
	keys = append(keys, c.Sentry.keys()...)
	return append(keys, c.Log.keys()...)
}

// check checks the keys against each other, and sets the values that depend on other keys.
func (c *API) check() error {
	if c.HTTP.WriteTimeout <= c.HTTP.RequestTimeout {
		return problem("http.write_timeout", "must be longer than http.request_timeout (%s)", c.HTTP.RequestTimeout)
	}
	if c.HTTP.MaxBodyBytes > 0 && c.HTTP.MaxBodyBytes < kib {
		return problem("http.max_body_bytes", "is %s, must be 0 or from 1KiB to 256MiB", formatSize(c.HTTP.MaxBodyBytes))
	}
	if c.HTTP.MaxBodyBytes == 0 {
		c.HTTP.MaxBodyBytes = c.Outbox.MaxEventBytes + bodyEnvelope
	}
	if c.HTTP.BodyBudget == 0 {
		c.HTTP.BodyBudget = max(2*c.HTTP.MaxBodyBytes, mib)
	}
	// The largest body may use three quarters of the budget.
	if least := max(c.HTTP.MaxBodyBytes+(c.HTTP.MaxBodyBytes+2)/3, mib); c.HTTP.BodyBudget < least {
		return problem("http.body_budget", "must be at least %s: 1 MiB, and four thirds of http.max_body_bytes", formatSize(least))
	}
	return nil
}

func (c *Relay) keys() []key {
	keys := []key{environmentKey(&c.Environment)}
	keys = append(keys, c.Postgres.keys("0", 0,
		"Maximum connections to PostgreSQL; 0 means two per worker and seven more.")...)
	keys = append(keys,
		secret(maskDSN, text("postgres.listen_dsn", &c.Postgres.ListenDSN, "",
			"PostgreSQL without the pooler, for LISTEN; empty means postgres.dsn.", isOptionalDSN)),
		text("postgres.history", &c.Postgres.History, HistoryChecked,
			"Whether a failover is taken for a change of history: checked, or lossless if no failover loses a commit.", isHistory),
		required(secret(maskDSN, text("clickhouse.dsn", &c.ClickHouse.DSN, "",
			"ClickHouse: clickhouse://USER:PASSWORD@HOST:9000/DATABASE, or http(s)://….", isClickHouseDSN))),
		text("clickhouse.table", &c.ClickHouse.Table, "event_log",
			"Table that receives the events, in the database of the DSN.", isTable),
		text("clickhouse.cluster", &c.ClickHouse.Cluster, "",
			"Cluster that replicates the table; empty means a single server.", isCluster),
		integer("relay.workers", &c.Relay.Workers, "2", 1, 64,
			"Batches that one process delivers at a time."),
		integer("relay.batch_max_rows", &c.Relay.BatchMaxRows, "50000", 1, maxBlockRows,
			"Maximum events in a batch; each batch is one insert."),
		size("relay.batch_max_bytes", &c.Relay.BatchMaxBytes, "32MiB", 1*kib, maxBlockBytes-1,
			"Maximum bytes of all batches that one process holds in memory. "+
				"A batch has at most half of this size; a larger event forms its own batch."),
		duration("relay.linger", &c.Relay.Linger, "250ms", time.Millisecond, time.Minute,
			"Minimum time between partial batches, for all relays together."),
		duration("relay.poll_interval", &c.Relay.PollInterval, "5s", 10*time.Millisecond, 10*time.Minute,
			"How often an idle relay polls for events."),
		duration("relay.flush_timeout", &c.Relay.FlushTimeout, "30s", time.Second, 10*time.Minute,
			"Time limit for one insert, in the relay and in ClickHouse."),
		duration("relay.shutdown_timeout", &c.Relay.ShutdownTimeout, "35s", 10*time.Millisecond, 15*time.Minute,
			"Time limit for batches in flight when the relay stops; the relay then releases them."),
		duration("relay.backoff_min", &c.Relay.BackoffMin, "500ms", 10*time.Millisecond, time.Minute,
			"Pause after the first failure; each consecutive failure doubles it."),
		duration("relay.backoff_max", &c.Relay.BackoffMax, "30s", 10*time.Millisecond, time.Hour,
			"Maximum pause after failures."),
		integer("relay.dead_letter_attempts", &c.Relay.DeadLetterAttempts, "5", 1, 1000,
			"Failed attempts after which an event that ClickHouse fails to store becomes a dead letter."),
		duration("relay.dead_letter_after", &c.Relay.DeadLetterAfter, "1m", 10*time.Millisecond, 24*time.Hour,
			"Minimum time for which the event has failed alone."),
		integer("relay.dead_letters_per_hour", &c.Relay.DeadLettersPerHour, "1000", 1, 1_000_000,
			"Dead letters of all relays together in an hour, before the fuse blows."),
		text("housekeeping.vacuum", &c.Housekeeping.Vacuum, "on",
			"Vacuum outbox_events when many of its rows are dead, if the role may: on or off.", isOnOrOff),
		duration("housekeeping.dead_letter_retention", &c.Housekeeping.DeadLetterRetention, "0s", 0, tenYears,
			"Age at which dead letters are deleted; 0s keeps them until an operator decides."),
		size("outbox.max_backlog_bytes", &c.Outbox.MaxBacklogBytes, "0", 0, maxBacklog,
			"The API's outbox.max_backlog_bytes, for the relay's page; 0 means no limit."),
		duration("housekeeping.audit_retention", &c.Housekeeping.AuditRetention, "2160h", 0, tenYears,
			"Age at which records of operators' actions are deleted; 0s keeps them."),
		address("admin.addr", &c.Admin.Addr, "127.0.0.1:9091", adminUsage),
		secret(maskAll, text("admin.token", &c.Admin.Token, "",
			"Token with which operators log in to the relay's page; if empty, the page exists only on a loopback address.", isToken)),
	)
	keys = append(keys, c.Sentry.keys()...)
	return append(keys, c.Log.keys()...)
}

const maxBacklog = 1 << 50 // bytes

const tenYears = 87_600 * time.Hour

func (c *Relay) check() error {
	if c.Relay.BackoffMax < c.Relay.BackoffMin {
		return problem("relay.backoff_max", "must not be shorter than relay.backoff_min (%s)", c.Relay.BackoffMin)
	}
	return nil
}

const adminUsage = "Listen address of the operators' port: /livez, /readyz, /metrics; port 0 picks a free port and logs it."

func environmentKey(value *string) key {
	return text("environment", value, "Local",
		"Name of the deployment, for the events and for Sentry.", isEnvironment)
}

func (c *Postgres) keys(maxOpenConns string, least int, usage string) []key {
	return []key{
		required(secret(maskDSN, text("postgres.dsn", &c.DSN, "",
			"PostgreSQL: postgres://USER:PASSWORD@HOST:5432/DATABASE, or key=value pairs.", isPostgresDSN))),
		text("postgres.password_file", &c.PasswordFile, "",
			"File with the password, read for each connection; empty means the password of the DSN.", isPath),
		text("postgres.schema", &c.Schema, "",
			"Schema of Diehard's tables; empty means the first schema of the session's search_path.", isSchema),
		integer("postgres.max_open_conns", &c.MaxOpenConns, maxOpenConns, least, 10_000, usage),
	}
}

func (c *Sentry) keys() []key {
	return []key{
		secret(maskSentryDSN, text("sentry.dsn", &c.DSN, "",
			"DSN of the Sentry project for errors and transactions; empty turns Sentry off.", isSentryDSN)),
		fraction("sentry.traces_sample_rate", &c.TracesSampleRate, "1",
			"Fraction of requests and batches that Sentry receives as transactions."),
	}
}

func (c *Log) keys() []key {
	return []key{
		text("log.level", &c.Level, "info", "Minimum level of log records: debug, info, warn or error.", isLevel),
		text("log.format", &c.Format, "json", "Format of log records: json or text.", isFormat),
	}
}

// CheckAccess returns an error if authentication is on and no API key is set. Only the
// command serve calls CheckAccess.
func (c *API) CheckAccess() error {
	if len(c.API.Keys) == 0 && c.API.Auth != Off {
		return problem("api.keys", "is empty: set it to the SHA-256 digests of the API keys (printf %%s KEY | sha256sum), "+
			"or set api.auth to off to disable authentication")
	}
	return nil
}

func isOptionalDSN(value string) error {
	if value == "" {
		return nil
	}
	return isPostgresDSN(value)
}

const minToken = 16 // bytes

func isToken(value string) error {
	switch {
	case value == "":
		return nil
	case len(value) < minToken:
		return fmt.Errorf("has %d bytes, must have at least %d: openssl rand -hex 16 makes one", len(value), minToken)
	case strings.ContainsFunc(value, func(c rune) bool { return c <= ' ' || c > '~' }):
		return errors.New("must be printable ASCII without spaces")
	}
	return nil
}

// maxRate is the maximum of a rate limit, in requests per second.
const maxRate = 1_000_000

func isRefusal(value string) error {
	if value != RefuseEvents && value != RefuseChanges {
		return errors.New("must be events or changes")
	}
	return nil
}

func isHistory(value string) error {
	if value != HistoryChecked && value != HistoryLossless {
		return errors.New("must be checked or lossless")
	}
	return nil
}

func isOnOrOff(value string) error {
	if value != "on" && value != Off {
		return fmt.Errorf("is %q, must be on or off", value)
	}
	return nil
}

var apiKeyName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// namelessDigits is the number of digits of the digest in the default name of a key.
const namelessDigits = 8

// parseAPIKey parses DIGEST, CLIENT:DIGEST or CLIENT/KEY:DIGEST, each with an optional list
// of scopes, :SCOPE+SCOPE. The default name of a key is "key-" and the first digits of the
// digest. This name is also the default name of the client.
//
// The errors do not contain parts that may be a key.
func parseAPIKey(text string, others []APIKey) (key APIKey, err error) {
	parts := strings.Split(text, ":")
	at := slices.IndexFunc(parts, isDigest)
	if at < 0 || at > 1 || len(parts) > at+2 {
		return APIKey{}, errors.New("has an invalid entry: use DIGEST, CLIENT:DIGEST or CLIENT/KEY:DIGEST, with the 64 hex digits of a SHA-256 digest, " +
			"and optionally :SCOPE+SCOPE")
	}
	digest := strings.ToLower(parts[at])
	_, _ = hex.Decode(key.Digest[:], []byte(digest)) // isDigest has checked it
	key.Name = "key-" + digest[:namelessDigits]
	key.Client = key.Name
	if at == 1 {
		var named bool
		var name string
		if key.Client, name, named = strings.Cut(parts[0], "/"); named {
			key.Name = name
		}
	}
	if !apiKeyName.MatchString(key.Client) || !apiKeyName.MatchString(key.Name) {
		return APIKey{}, fmt.Errorf("has an invalid name for the digest %s…: use CLIENT or CLIENT/KEY, each with 1 to 64 letters, digits and . _ -",
			digest[:namelessDigits])
	}
	if len(parts) > at+1 {
		if key.Scopes, err = parseScopes(parts[at+1]); err != nil {
			return APIKey{}, err
		}
	}
	for _, other := range others {
		if other.Client == key.Client && other.Name == key.Name {
			return APIKey{}, fmt.Errorf("has the key %s of the client %s twice", key.Name, key.Client)
		}
		if other.Digest == key.Digest {
			return APIKey{}, fmt.Errorf("has the same digest for %s/%s and %s/%s", other.Client, other.Name, key.Client, key.Name)
		}
	}
	return key, nil
}

func isDigest(text string) bool {
	decoded, err := hex.DecodeString(text)
	return err == nil && len(decoded) == sha256.Size
}

func parseScopes(text string) ([]string, error) {
	scopes := strings.Split(text, "+")
	for i, name := range scopes {
		if !slices.Contains(scope.All(), name) {
			return nil, fmt.Errorf("has an unknown scope: use %s", strings.Join(scope.All(), ", "))
		}
		if slices.Contains(scopes[:i], name) {
			return nil, fmt.Errorf("has the scope %s twice", name)
		}
	}
	return scopes, nil
}

func formatAPIKey(key APIKey) string {
	text := key.Client + "/" + key.Name + ":" + hex.EncodeToString(key.Digest[:])
	if len(key.Scopes) > 0 {
		text += ":" + strings.Join(key.Scopes, "+")
	}
	return text
}

func parseNetwork(text string, _ []netip.Prefix) (netip.Prefix, error) {
	if address, err := netip.ParseAddr(text); err == nil {
		return address.Prefix(address.BitLen()) //nolint:wrapcheck // never fails
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil || prefix != prefix.Masked() {
		return netip.Prefix{}, fmt.Errorf("has the invalid network %q: use a form such as 10.0.0.0/8 or 2001:db8::/32", text)
	}
	return prefix, nil
}

// maxEnvironmentBytes equals the limit in the table outbox_events.
const maxEnvironmentBytes = 128

func isEnvironment(value string) error {
	switch {
	case value == "":
		return errors.New("is empty")
	case len(value) > maxEnvironmentBytes:
		return fmt.Errorf("is longer than %d bytes", maxEnvironmentBytes)
	case !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' }):
		return errors.New("contains control characters or invalid UTF-8")
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

// maxIdentifierBytes is the maximum length of a name in PostgreSQL. PostgreSQL
// truncates longer names.
const maxIdentifierBytes = 63

func isSchema(value string) error {
	switch {
	case len(value) > maxIdentifierBytes:
		return fmt.Errorf("is longer than %d bytes", maxIdentifierBytes)
	case !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' }):
		return errors.New("contains control characters or invalid UTF-8")
	case strings.HasPrefix(value, "pg_") || value == "information_schema":
		return fmt.Errorf("is %q, which PostgreSQL reserves", value)
	}
	return nil
}

var clickHouseDSN = regexp.MustCompile(`^(clickhouse|tcp|https?)://[^/?#]`)

// isClickHouseDSN checks the form of the DSN. The sink checks the rest.
func isClickHouseDSN(value string) error {
	if value != "" && !clickHouseDSN.MatchString(value) {
		return errors.New("is not a ClickHouse DSN: it must begin with clickhouse://HOST, http://HOST or https://HOST")
	}
	return nil
}

var (
	table   = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	cluster = regexp.MustCompile(`^[A-Za-z0-9_{}.-]*$`)
)

func isTable(value string) error {
	if !table.MatchString(value) {
		return fmt.Errorf("is %q, which is not a table name: use letters, digits and _, and no digit first", value)
	}
	return nil
}

func isCluster(value string) error {
	if !cluster.MatchString(value) {
		return fmt.Errorf("is %q, which is not a cluster name: use letters, digits and _ - . { }", value)
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
		return fmt.Errorf("is %q, must be debug, info, warn or error", value)
	}
	return nil
}

func isFormat(value string) error {
	if value != string(telemetry.JSON) && value != string(telemetry.Text) {
		return fmt.Errorf("is %q, must be json or text", value)
	}
	return nil
}

func isPath(value string) error {
	if strings.ContainsRune(value, 0) {
		return errors.New("has a NUL byte")
	}
	return nil
}
