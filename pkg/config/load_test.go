package config_test

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/spf13/pflag"

	"github.com/diehard-outbox/diehard/pkg/config"
)

const (
	postgresDSN   = "postgres://user:s3cret@db.internal:5432/diehard"
	clickHouseDSN = "clickhouse://user:s3cret@ch.internal:9000/diehard"
)

// relayFlags returns the relay's flags, parsed from the arguments.
func relayFlags(arguments ...string) *pflag.FlagSet {
	GinkgoHelper()
	flags := pflag.NewFlagSet("relay", pflag.ContinueOnError)
	config.AddRelayFlags(flags)
	Expect(flags.Parse(arguments)).To(Succeed())
	return flags
}

// Digests of API keys.
var digestA, digestB, digestC = strings.Repeat("aa", 32), strings.Repeat("bb", 32), strings.Repeat("cc", 32)

var _ = Describe("loading", func() {
	setRequired := func() {
		GinkgoT().Setenv("DIEHARD_POSTGRES_DSN", postgresDSN)
		GinkgoT().Setenv("DIEHARD_CLICKHOUSE_DSN", clickHouseDSN)
	}

	It("prefers flags over the environment, the file and the default, in this order", func() {
		setRequired()
		file := write("relay:\n  workers: 3\n  batch_max_rows: 3\n  linger: 3s\n")
		GinkgoT().Setenv("DIEHARD_RELAY_WORKERS", "4")
		GinkgoT().Setenv("DIEHARD_RELAY_BATCH_MAX_ROWS", "4")
		c, unknown, err := config.LoadRelay(config.LoadOptions{File: file, Flags: relayFlags("--relay-workers=5")})
		Expect(err).NotTo(HaveOccurred())
		Expect(unknown).To(BeEmpty())
		Expect(c.Relay.Workers).To(Equal(5))
		Expect(c.Relay.BatchMaxRows).To(Equal(4))
		Expect(c.Relay.Linger).To(Equal(3 * time.Second))
		Expect(c.Relay.PollInterval).To(Equal(5 * time.Second))
	})

	It("reads secrets from files", func() {
		GinkgoT().Setenv("DIEHARD_POSTGRES_DSN_FILE", write(postgresDSN+"\n"))
		GinkgoT().Setenv("DIEHARD_CLICKHOUSE_DSN_FILE", write(clickHouseDSN))
		GinkgoT().Setenv("DIEHARD_ADMIN_TOKEN_FILE", write("  from-the-file-1234\n"))
		GinkgoT().Setenv("DIEHARD_RELAY_WORKERS_FILE", write("7"))
		c, unknown, err := config.LoadRelay(config.LoadOptions{Flags: relayFlags("--admin-token=from-the-flag-123")})
		Expect(err).NotTo(HaveOccurred())
		Expect(unknown).To(Equal([]string{"DIEHARD_RELAY_WORKERS_FILE"}), "it is not a secret")
		Expect(c.Postgres.DSN).To(Equal(postgresDSN))
		Expect(c.ClickHouse.DSN).To(Equal(clickHouseDSN))
		Expect(c.Admin.Token).To(Equal("from-the-flag-123"))
		Expect(c.Relay.Workers).To(Equal(2))
		c, _, err = config.LoadRelay(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(c.Admin.Token).To(Equal("from-the-file-1234"))
	})

	DescribeTable("refuses files with secrets", func(set map[string]string, expected string) {
		setRequired()
		for name, value := range set {
			GinkgoT().Setenv(name, value)
		}
		_, _, err := config.LoadRelay(config.LoadOptions{})
		Expect(err).To(MatchError(MatchRegexp(expected)))
		Expect(err).NotTo(MatchError(ContainSubstring("s3cret")))
	},
		Entry("beside the variable", map[string]string{"DIEHARD_POSTGRES_DSN_FILE": "/dev/null"},
			`^postgres\.dsn \(DIEHARD_POSTGRES_DSN\) is also set by DIEHARD_POSTGRES_DSN_FILE: unset one of them$`),
		Entry("that are missing", map[string]string{"DIEHARD_ADMIN_TOKEN_FILE": "/nowhere/token"},
			`^admin\.token \(DIEHARD_ADMIN_TOKEN\) cannot be read from DIEHARD_ADMIN_TOKEN_FILE: open /nowhere/token: no such file or directory$`),
		Entry("that are empty", map[string]string{"DIEHARD_ADMIN_TOKEN_FILE": "/dev/null"},
			`^admin\.token \(DIEHARD_ADMIN_TOKEN\) cannot be read from DIEHARD_ADMIN_TOKEN_FILE: the file /dev/null is empty$`),
	)

	It("has the documented defaults", func() {
		setRequired()
		api, _, err := config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(api.Environment).To(Equal("Local"))
		Expect(api.HTTP.Addr).To(Equal("127.0.0.1:8080"))
		Expect(api.HTTP.MaxBodyBytes).To(BeEquivalentTo(16<<20 + 64<<10))
		Expect(api.HTTP.BodyBudget).To(BeEquivalentTo(2 * (16<<20 + 64<<10)))
		Expect(api.Outbox).To(Equal(config.Outbox{MaxEventBytes: 16 << 20, FullRefuses: config.RefuseEvents}))
		Expect(api.Admin.Addr).To(Equal("127.0.0.1:9090"))
		Expect(api.Sentry).To(Equal(config.Sentry{TracesSampleRate: 1}))
		Expect(api.Log).To(Equal(config.Log{Level: "info", Format: "json"}))

		relay, _, err := config.LoadRelay(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(relay.ClickHouse.Table).To(Equal("event_log"))
		Expect(relay.Admin.Addr).To(Equal("127.0.0.1:9091"))
		Expect(relay.Relay).To(Equal(config.Delivery{
			Workers: 2, BatchMaxRows: 50_000, BatchMaxBytes: 32 << 20, Linger: 250 * time.Millisecond,
			PollInterval: 5 * time.Second, FlushTimeout: 30 * time.Second, ShutdownTimeout: 35 * time.Second,
			BackoffMin: 500 * time.Millisecond, BackoffMax: 30 * time.Second,
			DeadLetterAttempts: 5, DeadLetterAfter: time.Minute, DeadLettersPerHour: 1000,
		}))
		Expect(relay.Housekeeping).To(Equal(config.Housekeeping{Vacuum: "on", AuditRetention: 90 * 24 * time.Hour}))
	})

	It("requires clickhouse.dsn only for the relay", func() {
		GinkgoT().Setenv("DIEHARD_POSTGRES_DSN", postgresDSN)
		_, _, err := config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		_, _, err = config.LoadRelay(config.LoadOptions{})
		Expect(err).To(MatchError("clickhouse.dsn (DIEHARD_CLICKHOUSE_DSN) is required"))
	})

	It("treats an empty variable as unset", func() {
		setRequired()
		GinkgoT().Setenv("DIEHARD_LOG_LEVEL", "")
		c, _, err := config.LoadAPI(config.LoadOptions{File: write("log: {level: debug}")})
		Expect(err).NotTo(HaveOccurred())
		Expect(c.Log.Level).To(Equal("debug"))
	})

	It("accepts a file whose sections are commented out", func() {
		setRequired()
		_, _, err := config.LoadAPI(config.LoadOptions{File: write("http:\n# addr: :80\nlog:\n  level:\n")})
		Expect(err).NotTo(HaveOccurred())
	})

	It("reports unknown variables, except for those of the other program and of devstack", func() {
		setRequired()
		GinkgoT().Setenv("DIEHARD_RELAY_WORKER", "1")
		GinkgoT().Setenv("DIEHARD_ADMIN_ADRR", ":1")
		GinkgoT().Setenv("DIEHARD_RELAY_WORKERS", "1")
		GinkgoT().Setenv("DIEHARD_DEV_POSTGRES_BIN", "/bin")
		GinkgoT().Setenv("DIEHARD_DEVSTACK_BIN", "/bin/devstack")
		_, unknown, err := config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(unknown).To(Equal([]string{"DIEHARD_ADMIN_ADRR", "DIEHARD_RELAY_WORKER"}))
	})

	DescribeTable("refuses an invalid file with a one-line error",
		func(content, expected string) {
			setRequired()
			path := write(content)
			_, _, err := config.LoadAPI(config.LoadOptions{File: path})
			Expect(err).To(MatchError(ContainSubstring(strings.ReplaceAll(expected, "FILE", path))))
			Expect(err.Error()).NotTo(ContainSubstring("\n"))
			_, ok := errors.AsType[*config.Error](err)
			Expect(ok).To(BeTrue())
		},
		Entry("an unknown key", "log:\n  lvl: info", "log.lvl in FILE is an unknown key"),
		Entry("an unknown section", "logs:\n  level: info", "logs.level in FILE is an unknown key"),
		Entry("a section that is a value", "log: info", "log in FILE is an unknown key"),
		Entry("a key of the relay", "relay:\n  workers: 3", "relay.workers in FILE is a key of the other program"),
		Entry("a list", "log:\n  level: [info]", "log.level (DIEHARD_LOG_LEVEL) must be a single value"),
		Entry("invalid YAML", "log:\n\tlevel: info", "parse FILE: yaml:"),
		Entry("several errors in the YAML", "a: b\na: c\nb: 1\nb: 2", "already defined"),
	)

	It("names a missing file", func() {
		_, _, err := config.LoadAPI(config.LoadOptions{File: "/no/such/file.yaml"})
		Expect(err).To(MatchError(ContainSubstring("/no/such/file.yaml: no such file")))
	})

	DescribeTable("checks every value and names the key, its variable and the problem",
		func(variable, value, expected string) {
			setRequired()
			GinkgoT().Setenv(variable, value)
			_, _, apiErr := config.LoadAPI(config.LoadOptions{})
			_, _, relayErr := config.LoadRelay(config.LoadOptions{})
			err := errors.Join(apiErr, relayErr)
			Expect(err).To(MatchError(ContainSubstring(expected)))
			Expect(err).To(MatchError(ContainSubstring("(" + variable + ") ")))
			Expect(err).NotTo(MatchError(ContainSubstring("s3cret")))
		},
		Entry("control characters", "DIEHARD_ENVIRONMENT", "a\tb", "environment (DIEHARD_ENVIRONMENT) contains control characters"),
		Entry("a long name", "DIEHARD_ENVIRONMENT", strings.Repeat("x", 129), "longer than 128 bytes"),
		Entry("an invalid DSN", "DIEHARD_POSTGRES_DSN", "postgres://u:s3cret/@h", "is not a PostgreSQL DSN"),
		Entry("a parameter of another driver", "DIEHARD_POSTGRES_DSN", "postgres://u:s3cret@h/d?schema=public",
			"the parameter schema is not supported: remove it and set postgres.schema"),
		Entry("a number in words", "DIEHARD_POSTGRES_MAX_OPEN_CONNS", "many", `is "many", which is not a whole number`),
		Entry("one connection", "DIEHARD_POSTGRES_MAX_OPEN_CONNS", "1", "is 1, must be from 2 to 10000"),
		Entry("another database", "DIEHARD_CLICKHOUSE_DSN", "mysql://u:s3cret@h/d", "is not a ClickHouse DSN"),
		Entry("a table with a dot", "DIEHARD_CLICKHOUSE_TABLE", "a.b", `is "a.b", which is not a table name`),
		Entry("a cluster with a quote", "DIEHARD_CLICKHOUSE_CLUSTER", "a'b", "which is not a cluster name"),
		Entry("a missing port", "DIEHARD_HTTP_ADDR", "localhost", `is "localhost", which is not HOST:PORT`),
		Entry("a high port", "DIEHARD_ADMIN_ADDR", ":65536", "whose port is not a number from 0 to 65535"),
		Entry("a key instead of its digest", "DIEHARD_API_KEYS", "s3cret", "has an invalid entry: use DIGEST, CLIENT:DIGEST or CLIENT/KEY:DIGEST, with the 64 hex digits of a SHA-256 digest"),
		Entry("a short digest", "DIEHARD_API_KEYS", "a:00", "has an invalid entry"),
		Entry("a name with a space", "DIEHARD_API_KEYS", "a b:"+digestA, `has an invalid name for the digest aaaaaaaa…: use CLIENT or CLIENT/KEY, each with 1 to 64 letters, digits and . _ -`),
		Entry("an empty name", "DIEHARD_API_KEYS", ":"+digestA, `has an invalid name for the digest aaaaaaaa…`),
		Entry("an empty name of a key", "DIEHARD_API_KEYS", "a/:"+digestA, "has an invalid name"),
		Entry("a duplicate name", "DIEHARD_API_KEYS", "a/1:"+digestA+",a/1:"+digestB, "has the key 1 of the client a twice"),
		Entry("an unknown scope", "DIEHARD_API_KEYS", "a:"+digestA+":users.read+admin", "has an unknown scope: use users.read, users.write, events.publish"),
		Entry("an empty scope", "DIEHARD_API_KEYS", "a:"+digestA+":", "has an unknown scope"),
		Entry("a duplicate scope", "DIEHARD_API_KEYS", "a:"+digestA+":users.read+users.read", "has the scope users.read twice"),
		Entry("a fourth part", "DIEHARD_API_KEYS", "a:"+digestA+":users.read:x", "has an invalid entry"),
		Entry("a duplicate key", "DIEHARD_API_KEYS", "a:"+digestA+",b:"+strings.ToUpper(digestA), "has the same digest for a/key-aaaaaaaa and b/key-aaaaaaaa"),
		Entry("neither on nor off", "DIEHARD_API_AUTH", "no", `is "no", must be on or off`),
		Entry("a network with bits beyond its length", "DIEHARD_HTTP_TRUSTED_PROXIES", "10.0.0.1/8", `has the invalid network "10.0.0.1/8"`),
		Entry("a host name", "DIEHARD_HTTP_TRUSTED_PROXIES", "10.0.0.0/8,proxy", `has the invalid network "proxy"`),
		Entry("a negative rate", "DIEHARD_HTTP_RATE_LIMIT_PER_KEY", "-1", "is -1, must be from 0 to 1e+06"),
		Entry("zero concurrency", "DIEHARD_HTTP_MAX_CONCURRENT_REQUESTS", "0", "is 0, must be from 1 to 100000"),
		Entry("an unknown unit", "DIEHARD_HTTP_MAX_BODY_BYTES", "1 MB", `is "1 MB", which is not a size`),
		Entry("a small body", "DIEHARD_HTTP_MAX_BODY_BYTES", "1023", "is 1023, must be 0 or from 1KiB to 256MiB"),
		Entry("a negative size", "DIEHARD_OUTBOX_MAX_EVENT_BYTES", "-1", "which is not a size"),
		Entry("a size that overflows", "DIEHARD_OUTBOX_MAX_EVENT_BYTES", "9999999999GiB", "which is not a size"),
		Entry("a duration without a unit", "DIEHARD_HTTP_READ_TIMEOUT", "10", `is "10", which is not a duration`),
		Entry("zero workers", "DIEHARD_RELAY_WORKERS", "0", "is 0, must be from 1 to 64"),
		Entry("more rows than a block", "DIEHARD_RELAY_BATCH_MAX_ROWS", "1048449", "must be from 1 to 1048448"),
		Entry("more bytes than a block", "DIEHARD_RELAY_BATCH_MAX_BYTES", "256MiB", "is 256MiB, must be from 1KiB to 268435455"),
		Entry("zero linger", "DIEHARD_RELAY_LINGER", "0s", "is 0s, must be from 1ms to 1m"),
		Entry("a short flush timeout", "DIEHARD_RELAY_FLUSH_TIMEOUT", "10ms", "must be from 1s to 10m"),
		Entry("a DSN without a project", "DIEHARD_SENTRY_DSN", "https://s3cret@host", "is not a Sentry DSN"),
		Entry("a short token", "DIEHARD_ADMIN_TOKEN", "0123456789abcde", "has 15 bytes, must have at least 16: openssl rand -hex 16 makes one"),
		Entry("a token with a space", "DIEHARD_ADMIN_TOKEN", "0123456789 abcdef", "must be printable ASCII without spaces"),
		Entry("a fraction above 1", "DIEHARD_SENTRY_TRACES_SAMPLE_RATE", "1.5", "is 1.5, must be from 0 to 1"),
		Entry("NaN", "DIEHARD_SENTRY_TRACES_SAMPLE_RATE", "NaN", "which is not a number"),
		Entry("an unknown level", "DIEHARD_LOG_LEVEL", "loud", `is "loud", must be debug, info, warn or error`),
		Entry("an unknown format", "DIEHARD_LOG_FORMAT", "xml", `is "xml", must be json or text`),
	)

	DescribeTable("parses sizes",
		func(text string, bytes int) {
			setRequired()
			GinkgoT().Setenv("DIEHARD_RELAY_BATCH_MAX_BYTES", text)
			c, _, err := config.LoadRelay(config.LoadOptions{})
			Expect(err).NotTo(HaveOccurred())
			Expect(c.Relay.BatchMaxBytes).To(BeEquivalentTo(bytes))
		},
		Entry(nil, "1048576", 1<<20),
		Entry(nil, "1048576B", 1<<20),
		Entry(nil, "2KiB", 2<<10),
		Entry(nil, " 32 MiB ", 32<<20),
		Entry(nil, "255MiB", 255<<20),
	)

	It("parses lists and masks their secrets", func() {
		setRequired()
		GinkgoT().Setenv("DIEHARD_API_KEYS", " billing:"+digestA+", "+digestB+",shop/2026-11:"+digestC+":users.read+events.publish")
		GinkgoT().Setenv("DIEHARD_HTTP_TRUSTED_PROXIES", "10.0.0.0/8,2001:db8::1")
		c, _, err := config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(c.API.Keys).To(Equal([]config.APIKey{
			{Client: "billing", Name: "key-aaaaaaaa", Digest: [32]byte(bytes.Repeat([]byte{0xaa}, 32))},
			{Client: "key-bbbbbbbb", Name: "key-bbbbbbbb", Digest: [32]byte(bytes.Repeat([]byte{0xbb}, 32))},
			{Client: "shop", Name: "2026-11", Digest: [32]byte(bytes.Repeat([]byte{0xcc}, 32)), Scopes: []string{"users.read", "events.publish"}},
		}))
		Expect(c.HTTP.TrustedProxies).To(Equal([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::1/128")}))
		var yaml bytes.Buffer
		Expect(c.WriteYAML(&yaml)).To(Succeed())
		Expect(yaml.String()).To(ContainSubstring("keys: billing/key-aaaaaaaa:xxxxx,key-bbbbbbbb/key-bbbbbbbb:xxxxx,shop/2026-11:xxxxx:users.read+events.publish\n"))
	})

	It("requires API keys to serve the API, unless authentication is off", func() {
		setRequired()
		c, _, err := config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(c.CheckAccess()).To(MatchError(ContainSubstring("api.keys (DIEHARD_API_KEYS) is empty")))
		GinkgoT().Setenv("DIEHARD_API_AUTH", "off")
		c, _, err = config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(c.CheckAccess()).To(Succeed())
	})

	It("checks keys against each other", func() {
		setRequired()
		GinkgoT().Setenv("DIEHARD_RELAY_BACKOFF_MIN", "31s")
		_, _, err := config.LoadRelay(config.LoadOptions{})
		Expect(err).To(MatchError("relay.backoff_max (DIEHARD_RELAY_BACKOFF_MAX) must not be shorter than relay.backoff_min (31s)"))
		GinkgoT().Setenv("DIEHARD_HTTP_BODY_BUDGET", "20MiB")
		_, _, err = config.LoadAPI(config.LoadOptions{})
		Expect(err).To(MatchError(ContainSubstring("http.body_budget (DIEHARD_HTTP_BODY_BUDGET) must be at least ")))
		GinkgoT().Setenv("DIEHARD_HTTP_MAX_BODY_BYTES", "15MiB")
		GinkgoT().Setenv("DIEHARD_HTTP_REQUEST_TIMEOUT", "20s")
		_, _, err = config.LoadAPI(config.LoadOptions{})
		Expect(err).To(MatchError("http.write_timeout (DIEHARD_HTTP_WRITE_TIMEOUT) must be longer than http.request_timeout (20s)"))
	})
})
