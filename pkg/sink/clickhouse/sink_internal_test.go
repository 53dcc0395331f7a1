package clickhouse

import (
	chgo "github.com/ClickHouse/clickhouse-go/v2"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = DescribeTable("Compression",
	func(dsn string, expected chgo.CompressionMethod) {
		_, driverOptions, err := parse(Options{DSN: dsn, Cluster: "fleet"})
		Expect(err).NotTo(HaveOccurred())
		if expected == chgo.CompressionNone {
			Expect(driverOptions.Compression).To(Or(BeNil(), HaveField("Method", expected)))
			return
		}
		Expect(driverOptions.Compression).To(HaveField("Method", expected))
	},
	Entry("over a network", "clickhouse://ch.example.com:9000/db", chgo.CompressionLZ4),
	Entry("over a network, HTTP", "http://10.0.0.7:8123/db", chgo.CompressionLZ4),
	Entry("over a network, without a port", "https://ch.example.com/db?secure=true", chgo.CompressionLZ4),
	Entry("over a network, to one of the hosts", "clickhouse://localhost:9000,ch.example.com:9000/db", chgo.CompressionLZ4),
	Entry("within the machine", "clickhouse://localhost:9000/db", chgo.CompressionNone),
	Entry("within the machine, by address", "http://127.0.0.2:8123/db", chgo.CompressionNone),
	Entry("within the machine, IPv6", "clickhouse://[::1]:9000/db", chgo.CompressionNone),
	Entry("within the machine, without a port", "http://localhost/db", chgo.CompressionNone),
	Entry("if the DSN sets LZ4", "clickhouse://localhost:9000/db?compress=lz4", chgo.CompressionLZ4),
	Entry("if the DSN sets another compression", "clickhouse://localhost:9000/db?compress=zstd", chgo.CompressionZSTD),
	Entry("if the DSN sets no compression", "clickhouse://ch.example.com:9000/db?compress=none", chgo.CompressionNone),
)
