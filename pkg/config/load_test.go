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

// relayFlags returns the parsed flags.
func relayFlags(arguments ...string) *pflag.FlagSet {
	GinkgoHelper()
	flags := pflag.NewFlagSet("relay", pflag.ContinueOnError)
	config.AddRelayFlags(flags)
	Expect(flags.Parse(arguments)).To(Succeed())
	return flags
}

// Digests of keys.
var digestA, digestB = strings.Repeat("aa", 32), strings.Repeat("bb", 32)

var _ = Describe("loading", func() {
	setRequired := func() {
		GinkgoT().Setenv("DIEHARD_POSTGRES_DSN", postgresDSN)
		GinkgoT().Setenv("DIEHARD_CLICKHOUSE_DSN", clickHouseDSN)
	}

	It("takes a key from the flag, else the environment, else the file, else the default", func() {
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

	It("has the contract's defaults", func() {
		setRequired()
		api, _, err := config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(api.Environment).To(Equal("Local"))
		Expect(api.HTTP.Addr).To(Equal("127.0.0.1:8080"))
		Expect(api.HTTP.MaxBodyBytes).To(BeEquivalentTo(16 << 20))
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
		}))
	})

	It("needs nothing of ClickHouse for the API", func() {
		GinkgoT().Setenv("DIEHARD_POSTGRES_DSN", postgresDSN)
		_, _, err := config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		_, _, err = config.LoadRelay(config.LoadOptions{})
		Expect(err).To(MatchError("clickhouse.dsn (DIEHARD_CLICKHOUSE_DSN) is required"))
	})

	It("takes an empty variable for none", func() {
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

	It("names variables that nobody reads, but none of the other program's and the development tool's", func() {
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

	DescribeTable("refuses a file that it cannot use, in one line",
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
		Entry("a list", "log:\n  level: [info]", "log.level (DIEHARD_LOG_LEVEL) is not a single value"),
		Entry("no YAML", "log:\n\tlevel: info", "parse FILE: yaml:"),
		Entry("several faults of the YAML", "a: b\na: c\nb: 1\nb: 2", "already defined"),
	)

	It("says that there is no such file", func() {
		_, _, err := config.LoadAPI(config.LoadOptions{File: "/no/such/file.yaml"})
		Expect(err).To(MatchError(ContainSubstring("/no/such/file.yaml: no such file")))
	})

	DescribeTable("checks every value and names the key, its variable and what is wrong",
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
		Entry("control characters", "DIEHARD_ENVIRONMENT", "a\tb", "environment (DIEHARD_ENVIRONMENT) is not plain text"),
		Entry("a long name", "DIEHARD_ENVIRONMENT", strings.Repeat("x", 129), "longer than 128 bytes"),
		Entry("a broken DSN", "DIEHARD_POSTGRES_DSN", "postgres://u:s3cret/@h", "is not a PostgreSQL DSN"),
		Entry("a number in words", "DIEHARD_POSTGRES_MAX_OPEN_CONNS", "many", `is "many", which is not a whole number`),
		Entry("one connection", "DIEHARD_POSTGRES_MAX_OPEN_CONNS", "1", "is 1, and has to be from 2 to 10000"),
		Entry("another database", "DIEHARD_CLICKHOUSE_DSN", "mysql://u:s3cret@h/d", "is not a ClickHouse DSN"),
		Entry("a table with a dot", "DIEHARD_CLICKHOUSE_TABLE", "a.b", `is "a.b", which is no table's name`),
		Entry("a cluster with a quote", "DIEHARD_CLICKHOUSE_CLUSTER", "a'b", "which is no cluster's name"),
		Entry("no port", "DIEHARD_HTTP_ADDR", "localhost", `is "localhost", which is not HOST:PORT`),
		Entry("a high port", "DIEHARD_ADMIN_ADDR", ":65536", "whose port is not a number from 0 to 65535"),
		Entry("a key instead of its digest", "DIEHARD_API_KEYS", "s3cret", "has a digest that is no SHA-256 in hex, 64 digits"),
		Entry("a short digest", "DIEHARD_API_KEYS", "a:00", "has a digest that is no SHA-256"),
		Entry("a name with a space", "DIEHARD_API_KEYS", "a b:"+digestA, `has the name "a b": letters, digits and . _ -, at most 64`),
		Entry("no name", "DIEHARD_API_KEYS", ":"+digestA, `has the name ""`),
		Entry("a name twice", "DIEHARD_API_KEYS", "a:"+digestA+",a:"+digestB, "has the name a twice"),
		Entry("a key twice", "DIEHARD_API_KEYS", "a:"+digestA+",b:"+strings.ToUpper(digestA), "has one key as a and b"),
		Entry("neither on nor off", "DIEHARD_API_AUTH", "no", `is "no", which is none of on, off`),
		Entry("a network with bits beyond its length", "DIEHARD_HTTP_TRUSTED_PROXIES", "10.0.0.1/8", `has "10.0.0.1/8", which is no network`),
		Entry("a host name", "DIEHARD_HTTP_TRUSTED_PROXIES", "10.0.0.0/8,proxy", `has "proxy", which is no network`),
		Entry("a negative rate", "DIEHARD_HTTP_RATE_LIMIT_PER_KEY", "-1", "is -1, and has to be from 0 to 1e+06"),
		Entry("no concurrency", "DIEHARD_HTTP_MAX_CONCURRENT_REQUESTS", "0", "is 0, and has to be from 1 to 100000"),
		Entry("an unknown unit", "DIEHARD_HTTP_MAX_BODY_BYTES", "1 MB", `is "1 MB", which is not a size`),
		Entry("a small body", "DIEHARD_HTTP_MAX_BODY_BYTES", "1023", "is 1023, and has to be from 1KiB to 128MiB"),
		Entry("a negative size", "DIEHARD_OUTBOX_MAX_EVENT_BYTES", "-1", "which is not a size"),
		Entry("a size beyond all bounds", "DIEHARD_OUTBOX_MAX_EVENT_BYTES", "9999999999GiB", "which is not a size"),
		Entry("no unit of time", "DIEHARD_HTTP_READ_TIMEOUT", "10", `is "10", which is not a duration`),
		Entry("no workers", "DIEHARD_RELAY_WORKERS", "0", "is 0, and has to be from 1 to 64"),
		Entry("two blocks by rows", "DIEHARD_RELAY_BATCH_MAX_ROWS", "1048449", "has to be from 1 to 1048448"),
		Entry("two blocks by bytes", "DIEHARD_RELAY_BATCH_MAX_BYTES", "256MiB", "is 256MiB, and has to be from 1KiB to 268435455"),
		Entry("no linger", "DIEHARD_RELAY_LINGER", "0s", "is 0s, and has to be from 1ms to 1m"),
		Entry("a short flush", "DIEHARD_RELAY_FLUSH_TIMEOUT", "10ms", "has to be from 1s to 10m"),
		Entry("no project", "DIEHARD_SENTRY_DSN", "https://s3cret@host", "is not a Sentry DSN"),
		Entry("more than all", "DIEHARD_SENTRY_TRACES_SAMPLE_RATE", "1.5", "is 1.5, and has to be from 0 to 1"),
		Entry("no number", "DIEHARD_SENTRY_TRACES_SAMPLE_RATE", "NaN", "which is not a number"),
		Entry("an unknown level", "DIEHARD_LOG_LEVEL", "loud", `is "loud" is none of`),
		Entry("an unknown format", "DIEHARD_LOG_FORMAT", "xml", `is "xml", which is none of json, text`),
	)

	DescribeTable("reads sizes",
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

	It("reads lists, and writes them with their secrets masked", func() {
		setRequired()
		GinkgoT().Setenv("DIEHARD_API_KEYS", " billing:"+digestA+", "+digestB+",")
		GinkgoT().Setenv("DIEHARD_HTTP_TRUSTED_PROXIES", "10.0.0.0/8,2001:db8::1")
		c, _, err := config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(c.API.Keys).To(Equal([]config.APIKey{
			{Name: "billing", Digest: [32]byte(bytes.Repeat([]byte{0xaa}, 32))},
			{Name: "key-bbbbbbbb", Digest: [32]byte(bytes.Repeat([]byte{0xbb}, 32))},
		}))
		Expect(c.HTTP.TrustedProxies).To(Equal([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::1/128")}))
		var yaml bytes.Buffer
		Expect(c.WriteYAML(&yaml)).To(Succeed())
		Expect(yaml.String()).To(ContainSubstring("keys: billing:xxxxx,key-bbbbbbbb:xxxxx\n"))
	})

	It("asks for keys where the API is served, unless everybody may use it", func() {
		setRequired()
		c, _, err := config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(c.CheckAccess()).To(MatchError(ContainSubstring("api.keys (DIEHARD_API_KEYS) is empty")))
		GinkgoT().Setenv("DIEHARD_API_AUTH", "off")
		c, _, err = config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		Expect(c.CheckAccess()).To(Succeed())
	})

	It("compares keys that depend on each other", func() {
		setRequired()
		GinkgoT().Setenv("DIEHARD_RELAY_BACKOFF_MIN", "31s")
		_, _, err := config.LoadRelay(config.LoadOptions{})
		Expect(err).To(MatchError("relay.backoff_max (DIEHARD_RELAY_BACKOFF_MAX) is shorter than relay.backoff_min (31s)"))
		GinkgoT().Setenv("DIEHARD_HTTP_REQUEST_TIMEOUT", "20s")
		_, _, err = config.LoadAPI(config.LoadOptions{})
		Expect(err).To(MatchError("http.write_timeout (DIEHARD_HTTP_WRITE_TIMEOUT) has to be longer than http.request_timeout (20s)"))
	})
})
