package chserver_test

import (
	"context"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = eachProtocol("clickhouse-go", func(protocol clickhouse.Protocol) {
	var conn driver.Conn

	BeforeEach(func() {
		conn = open(options(protocol))
	})

	It("responds to a ping and reports its version", func(ctx context.Context) {
		Expect(conn.Ping(ctx)).To(Succeed())
		version, err := conn.ServerVersion()
		Expect(err).NotTo(HaveOccurred())
		Expect(version.Version.Major).To(BeNumerically(">=", 26))
	})

	It("runs statements and returns inserted rows", func(ctx context.Context) {
		table := newName("t")
		Expect(conn.Exec(ctx, "CREATE TABLE "+table+" (id UInt64, name String) ENGINE = MergeTree ORDER BY id")).To(Succeed())
		batch, err := conn.PrepareBatch(ctx, "INSERT INTO "+table)
		Expect(err).NotTo(HaveOccurred())
		for i := range uint64(1000) {
			Expect(batch.Append(i, "x")).To(Succeed())
		}
		Expect(batch.Send()).To(Succeed())
		var count uint64
		Expect(conn.QueryRow(ctx, "SELECT count() FROM "+table+" WHERE name = ?", "x").Scan(&count)).To(Succeed())
		Expect(count).To(BeEquivalentTo(1000))
	})
})
