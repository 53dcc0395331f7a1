package integration_test

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("The command line", func() {
	// ended runs a program and waits for its exit code.
	ended := func(code int, program string, args []string, env ...string) *programs.Process {
		GinkgoHelper()
		p := programs.Run(suite.Prepared(), program, args, env...)
		p.EndsWith(code)
		return p
	}

	const somewhere = "DIEHARD_POSTGRES_DSN=postgres://diehard:s3cret@127.0.0.1:1/diehard"

	DescribeTable("reports invalid input in one line and exits with 2",
		func(program string, args []string, env []string, line string) {
			p := ended(2, program, args, env...)
			Expect(p.Out.Contents()).To(BeEmpty())
			Expect(string(p.Err.Contents())).To(Equal(line + "\n"))
		},
		Entry("no DSN", "api", nil, nil,
			"api: postgres.dsn (DIEHARD_POSTGRES_DSN) is required"),
		Entry("no DSN for ClickHouse", "relay", []string{"run"}, []string{somewhere},
			"relay: clickhouse.dsn (DIEHARD_CLICKHOUSE_DSN) is required"),
		Entry("a DSN that is invalid only for the sink", "relay", []string{"migrate"},
			[]string{somewhere, "DIEHARD_CLICKHOUSE_DSN=http://a,b/diehard"},
			"relay: clickhouse.dsn (DIEHARD_CLICKHOUSE_DSN) is invalid: clickhouse dsn: several hosts require clickhouse.cluster, the cluster of which they are replicas"),
		Entry("a value out of bounds", "relay", []string{"--relay-workers", "0"}, []string{somewhere, "DIEHARD_CLICKHOUSE_DSN=http://a/diehard"},
			"relay: relay.workers (DIEHARD_RELAY_WORKERS) is 0, must be from 1 to 64"),
		Entry("a key instead of its digest", "api", nil, []string{somewhere, "DIEHARD_API_KEYS=abc"},
			"api: api.keys (DIEHARD_API_KEYS) has an invalid entry: use DIGEST, CLIENT:DIGEST or CLIENT/KEY:DIGEST, "+
				"with the 64 hex digits of a SHA-256 digest, and optionally :SCOPE+SCOPE"),
		Entry("an unknown flag", "api", []string{"--sped"}, nil, "api: unknown flag: --sped"),
		Entry("an unknown command", "api", []string{"srve"}, nil, "api: unknown command \"srve\"; `api --help` lists the commands"),
		Entry("an unexpected argument", "api", []string{"serve", "now"}, nil, `api: api serve accepts no arguments, got "now"`),
		Entry("a missing file", "api", []string{"--config", "no-such.yaml"}, nil,
			"api: open no-such.yaml: no such file or directory"),
	)

	It("asks the running program whether it is ready", func(ctx SpecContext) {
		s := newSystem(ctx)
		proxy, through := faults.StartProxyTo(s.PostgresDSN)
		env := []string{"DIEHARD_POSTGRES_DSN=" + through, "DIEHARD_CLICKHOUSE_DSN=" + s.ClickHouse.Native}
		api, relay := s.API(env...), s.Relay(s.ClickHouse.Native, env...)
		ask := func(code int, program, addr string) string {
			GinkgoHelper()
			p := ended(code, program, []string{"health"}, "DIEHARD_ADMIN_ADDR="+addr)
			return string(p.Out.Contents()) + string(p.Err.Contents())
		}
		addrs := map[string]string{"api": strings.TrimPrefix(api.AdminURL(), "http://"), "relay": strings.TrimPrefix(relay.AdminURL(), "http://")}
		for program, addr := range addrs {
			Expect(ask(0, program, addr)).To(Equal("ready\n"))
			_, port, err := net.SplitHostPort(addr)
			Expect(err).NotTo(HaveOccurred())
			Expect(ask(0, program, ":"+port)).To(Equal("ready\n"), "an address of all interfaces")
		}
		proxy.Down()
		for program, addr := range addrs {
			Eventually(func(g Gomega) {
				p := programs.Run(suite.Prepared(), program, []string{"health"}, "DIEHARD_ADMIN_ADDR="+addr)
				p.EndsWithAny()
				g.Expect(p.ExitCode()).To(Equal(1))
				g.Expect(string(p.Err.Contents())).To(MatchRegexp(`^` + program + `: not ready: .*postgresql: [^\n]+\n$`))
			}).WithTimeout(patience).Should(Succeed())
		}
		Expect(ask(1, "relay", "127.0.0.1:1")).To(MatchRegexp(`^relay: not running: .*connection refused\n$`))
	})

	It("refuses to serve without authentication unless configured", func() {
		p := ended(2, "api", []string{"serve"}, somewhere)
		Expect(string(p.Err.Contents())).To(HaveSuffix("\napi: api.keys (DIEHARD_API_KEYS) is empty: " +
			"set it to the SHA-256 digests of the API keys (printf %s KEY | sha256sum), or set api.auth to off to disable authentication\n"))
	})

	It("shows the effective configuration with masked secrets: flags override the environment, which overrides the file", func() {
		file := filepath.Join(GinkgoT().TempDir(), "relay.yaml")
		Expect(os.WriteFile(file, []byte("relay: {workers: 3, linger: 1s, batch_max_rows: 7}\n"), 0o600)).To(Succeed())
		p := ended(0, "relay", []string{"config", "--json", "--config", file, "--relay-linger=3s"},
			somewhere, "DIEHARD_CLICKHOUSE_DSN=clickhouse://u:s3cret@h/d", "DIEHARD_RELAY_LINGER=2s", "DIEHARD_RELAY_WORKERS=4",
			"DIEHARD_RELAY_WORKRES=5")
		var effective struct {
			Postgres struct {
				DSN string `json:"dsn"`
			} `json:"postgres"`
			Relay struct {
				Workers      int    `json:"workers"`
				Linger       string `json:"linger"`
				BatchMaxRows int    `json:"batch_max_rows"`
			} `json:"relay"`
		}
		Expect(json.Unmarshal(p.Out.Contents(), &effective)).To(Succeed())
		Expect(effective.Relay.Workers).To(Equal(4))
		Expect(effective.Relay.Linger).To(Equal("3s"))
		Expect(effective.Relay.BatchMaxRows).To(Equal(7))
		Expect(effective.Postgres.DSN).To(HavePrefix("postgres://diehard:xxxxx@"))
		Expect(string(p.Out.Contents())).NotTo(ContainSubstring("s3cret"))
		Expect(string(p.Err.Contents())).To(ContainSubstring("DIEHARD_RELAY_WORKRES"))
	})

	It("prints its version", func() {
		p := ended(0, "relay", []string{"version", "--json"})
		var version map[string]string
		Expect(json.Unmarshal(p.Out.Contents(), &version)).To(Succeed())
		Expect(version).To(HaveKeyWithValue("name", "relay"))
		Expect(version).To(HaveKeyWithValue("version", "dev"))
		Expect(ended(0, "api", []string{"version"}).Out.Contents()).To(HavePrefix("api dev ("))
	})

	It("warns of a misspelled variable", func(ctx SpecContext) {
		s := newSystem(ctx)
		api := s.API("DIEHARD_HTTP_ADRR=:80")
		Eventually(api.Messages, patience).Should(ContainElement("unknown environment variable"))
	})

	Describe("with databases that are not migrated", func() {
		var postgresDSN, clickHouseDSN string
		BeforeEach(func(ctx SpecContext) {
			postgresDSN, clickHouseDSN = suite.EmptyPostgresDSN(ctx), suite.EmptyClickHouseDSNs(ctx).Native
		})
		env := func() []string {
			return []string{
				"DIEHARD_POSTGRES_DSN=" + postgresDSN, "DIEHARD_CLICKHOUSE_DSN=" + clickHouseDSN,
				"DIEHARD_HTTP_ADDR=127.0.0.1:0", "DIEHARD_ADMIN_ADDR=127.0.0.1:0",
			}
		}

		DescribeTable("refuses to start, and reports the required version", func(program, command string) {
			p := ended(1, program, nil, append(env(), "DIEHARD_API_AUTH=off")...)
			Expect(p.Log()).To(ContainElement(HaveKeyWithValue("err",
				MatchRegexp("tables for outbox in postgresql are too old: found version 0, need version [1-9][0-9]*; run `"+command+"`"))))
		}, Entry("the api", "api", "api migrate"), Entry("the relay", "relay", "relay migrate"))

		It("migrates them concurrently and repeatedly", func(ctx SpecContext) {
			all := make([]*programs.Process, 0, 4)
			for i := range 4 {
				all = append(all, programs.Run(suite.Prepared(), []string{"api", "relay"}[i%2], []string{"migrate"}, env()...))
			}
			for _, p := range all {
				p.Ended()
			}
			programs.Run(suite.Prepared(), "relay", []string{"migrate"}, env()...).Ended()

			programs.Serve(suite.Prepared(), "relay", env()...).AwaitReady()
			api := programs.Serve(suite.Prepared(), "api", env()...)
			api.AwaitReady()
			system.Create(ctx, api, system.NewUser{Email: "ada@example.com"})
			Eventually(ctx, func(ctx context.Context) (rows int, err error) {
				err = testengines.Scan(ctx, clickHouseDSN, "SELECT count() FROM event_log", &rows)
				return rows, err
			}).WithTimeout(patience).Should(Equal(1))
		})

		It("reports that the table in ClickHouse is missing", func() {
			programs.Run(suite.Prepared(), "api", []string{"migrate"}, env()...).Ended()
			p := ended(1, "relay", nil, env()...)
			Expect(p.Log()).To(ContainElement(HaveKeyWithValue("err", ContainSubstring("relay migrate"))))
		})
	})

	It("warns of a newer schema, and works", func(ctx SpecContext) {
		s := newSystem(ctx)
		s.Postgres.MustExec("INSERT INTO diehard_outbox_version (version_id, is_applied) VALUES (20991231, true)")
		api, relay := s.API(), s.Relay(s.ClickHouse.Native)
		for _, p := range []*programs.Process{api, relay} {
			Eventually(p.Messages, patience).Should(ContainElement("postgresql schema newer than this program"))
		}
		system.Create(ctx, api, system.NewUser{Email: "ada@example.com"})
		s.ExpectDelivered(ctx, 1)
	})

	It("starts without its databases, is not ready, and works when they start", func(ctx SpecContext) {
		s := newSystem(ctx)
		toPostgres, postgresDSN := faults.StartProxyTo(s.PostgresDSN)
		toClickHouse, clickHouseDSN := faults.StartProxyTo(s.ClickHouse.Native)
		toPostgres.Down()
		toClickHouse.Down()
		env := []string{
			"DIEHARD_POSTGRES_DSN=" + postgresDSN, "DIEHARD_CLICKHOUSE_DSN=" + clickHouseDSN,
			"DIEHARD_RELAY_BACKOFF_MIN=10ms", "DIEHARD_RELAY_BACKOFF_MAX=200ms",
		}
		api := programs.Serve(suite.Prepared(), "api", env...)
		relay := programs.Serve(suite.Prepared(), "relay", env...)
		for _, p := range []*programs.Process{api, relay} {
			Eventually(p.Messages, patience).Should(ContainElement("postgresql unavailable, retrying"))
			Expect(p.Ready()).To(Equal(http.StatusServiceUnavailable))
		}
		a, err := system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: "ada@example.com"})
		Expect(err).NotTo(HaveOccurred())
		Expect(a.Status).To(Equal(http.StatusServiceUnavailable))

		toPostgres.Up()
		Eventually(api.Ready, patience).Should(Equal(http.StatusOK))
		system.Create(ctx, api, system.NewUser{Email: "ada@example.com"})
		Expect(relay.Ready()).To(Equal(http.StatusServiceUnavailable))
		toClickHouse.Up()
		Eventually(relay.Ready, patience).Should(Equal(http.StatusOK))
		s.ExpectDelivered(ctx, 1)
	})

	DescribeTable("configures how often the API's garbage collector runs:", func(ctx SpecContext, variable string, percent, limit int) {
		api := newSystem(ctx).API(strings.Fields(variable)...)
		Expect(api.Metric("go_gc_gogc_percent")).To(BeNumerically("==", percent))
		Expect(api.Metric("go_gc_gomemlimit_bytes")).To(BeNumerically("==", limit))
	},
		// 64 MiB and eight times the budget of bodies.
		Entry("by default rarely, and more often above a limit for bodies", "GOGC=", 400, 64<<20+8*2*(16<<20+64<<10)),
		Entry("as configured by GOGC and the budget of bodies", "GOGC=50 DIEHARD_HTTP_BODY_BUDGET=64MiB", 50, 64<<20+8*64<<20),
		Entry("by default rarely, and more often above GOMEMLIMIT", "GOMEMLIMIT=64MiB", 400, 64<<20),
	)

	It("ends at once if its port is in use", func(ctx SpecContext) {
		taken, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(taken.Close)
		s := newSystem(ctx)
		for _, variable := range []string{"DIEHARD_ADMIN_ADDR=", "DIEHARD_HTTP_ADDR="} {
			p := programs.Serve(suite.Prepared(), "api", "DIEHARD_POSTGRES_DSN="+s.PostgresDSN, variable+taken.Addr().String())
			p.EndsWith(1)
			Expect(p.Log()).To(ContainElement(HaveKeyWithValue("err", ContainSubstring("address already in use"))))
		}
	})
})
