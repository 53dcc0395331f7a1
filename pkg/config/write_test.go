package config_test

import (
	"bytes"
	"encoding/json"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/config"
)

var _ = Describe("writing", func() {
	It("writes YAML that loads to the same configuration", func() {
		flags := relayFlags("--postgres-dsn=host=db", "--clickhouse-dsn=http://ch:8123",
			"--relay-workers=7", "--relay-batch-max-bytes=1536KiB", "--relay-linger=90s500ms")
		// 90.5 s exceeds the maximum of relay.linger.
		_, _, err := config.LoadRelay(config.LoadOptions{Flags: flags})
		Expect(err).To(MatchError(ContainSubstring("relay.linger (DIEHARD_RELAY_LINGER) is 1m30.5s")))

		Expect(flags.Set("relay-linger", "1500ms")).To(Succeed())
		c, _, err := config.LoadRelay(config.LoadOptions{Flags: flags})
		Expect(err).NotTo(HaveOccurred())
		var yaml bytes.Buffer
		Expect(c.WriteYAML(&yaml)).To(Succeed())
		Expect(yaml.String()).To(And(
			ContainSubstring("relay:\n  backoff_max: 30s\n  backoff_min: 500ms\n  batch_max_bytes: 1536KiB\n"),
			ContainSubstring("\n  linger: 1.5s\n"), ContainSubstring("\n  workers: 7\n"),
			ContainSubstring("  dsn: http://ch:8123\n")))
		again, _, err := config.LoadRelay(config.LoadOptions{File: write(yaml.String())})
		Expect(err).NotTo(HaveOccurred())
		Expect(again).To(Equal(c))
	})

	It("writes JSON", func() {
		flags := relayFlags("--postgres-dsn=host=db", "--clickhouse-dsn=http://ch:8123")
		c, _, err := config.LoadRelay(config.LoadOptions{Flags: flags})
		Expect(err).NotTo(HaveOccurred())
		var out bytes.Buffer
		Expect(c.WriteJSON(&out)).To(Succeed())
		var read map[string]any
		Expect(json.Unmarshal(out.Bytes(), &read)).To(Succeed())
		Expect(read).To(HaveKeyWithValue("environment", "Local"))
		Expect(read).To(HaveKeyWithValue("relay", HaveKeyWithValue("workers", float64(2))))
		Expect(read).To(HaveKeyWithValue("sentry", Equal(map[string]any{"dsn": "", "traces_sample_rate": float64(1)})))
	})

	DescribeTable("masks secrets",
		func(flag, value, expected string) {
			arguments := map[string]string{
				"postgres-dsn": "host=db", "clickhouse-dsn": "http://ch:8123", flag: value,
			}
			flags := relayFlags()
			for name, value := range arguments {
				Expect(flags.Set(name, value)).To(Succeed())
			}
			c, _, err := config.LoadRelay(config.LoadOptions{Flags: flags})
			Expect(err).NotTo(HaveOccurred())
			var yaml, json bytes.Buffer
			Expect(c.WriteYAML(&yaml)).To(Succeed())
			Expect(c.WriteJSON(&json)).To(Succeed())
			Expect(yaml.String()).To(ContainSubstring(": " + expected + "\n"))
			Expect(json.String()).To(ContainSubstring(`": "` + expected + `"`))
			Expect(yaml.String() + json.String()).NotTo(ContainSubstring("s3cret"))
		},
		Entry("in a URL", "postgres-dsn", "postgres://user:s3cret@h1:5432/db?sslmode=disable",
			"postgres://user:xxxxx@h1:5432/db?sslmode=disable"),
		Entry("in a URL whose password contains an at sign", "postgres-dsn", "postgres://user:s3cret@s3cret@h1/db",
			"postgres://user:xxxxx@h1/db"),
		Entry("in URL parameters", "postgres-dsn", "postgres://h1/db?password=s3cret&user=u&my.password=s3cret",
			"postgres://h1/db?password=xxxxx&user=u&my.password=xxxxx"),
		Entry("in key=value pairs", "postgres-dsn", "host=h user=u password=s3cret dbname=d",
			"host=h user=u password=xxxxx dbname=d"),
		Entry("in quoted pairs", "postgres-dsn", `password = 'a s3cret \' s3cret' host = h`,
			"password=xxxxx host = h"),
		Entry("in escaped pairs", "postgres-dsn", `password=a\ s3cret host=h`, "password=xxxxx host=h"),
		Entry("in a URL without a user", "clickhouse-dsn", "clickhouse://h1:9000,h2:9000/db?compress=lz4",
			"clickhouse://h1:9000,h2:9000/db?compress=lz4"),
		Entry("in a URL with several hosts", "clickhouse-dsn", "clickhouse://u:s3cret@h1:9000,h2:9000/db",
			"clickhouse://u:xxxxx@h1:9000,h2:9000/db"),
		Entry("in parameters of a ClickHouse DSN", "clickhouse-dsn", "http://h:8123?username=u&password=s3cret",
			"http://h:8123?username=u&password=xxxxx"),
		Entry("in a proxy URL", "clickhouse-dsn", "http://h:8123/db?http_proxy=http%3A%2F%2Fu%3As3cret%40p",
			"http://h:8123/db?http_proxy=xxxxx"),
		Entry("in a URL whose password contains a slash", "clickhouse-dsn", "clickhouse://u:s3c/s3cret@h/db", "clickhouse://xxxxx"),
		Entry("in a token", "admin-token", "s3cret-s3cret-s3cret", "xxxxx"),
		Entry("in a Sentry DSN", "sentry-dsn", "https://s3cret@o1.ingest.sentry.io/42", "https://xxxxx@o1.ingest.sentry.io/42"),
		Entry("in a Sentry DSN with a secret key", "sentry-dsn", "https://s3cret:s3cret@sentry.internal/42", "https://xxxxx@sentry.internal/42"),
	)
})
