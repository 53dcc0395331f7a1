package clickhouse

import (
	"context"
	"errors"

	chgo "github.com/ClickHouse/clickhouse-go/v2"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

var _ = DescribeTable("An insert that exceeds a memory limit",
	func(message string, expected sink.Class) {
		err := (&Sink{}).classifyInsert(context.Background(), "insert", &chgo.Exception{Code: memoryLimitExceeded, Message: message})
		Expect(sink.ClassOf(err)).To(Equal(expected))
		server, _ := errors.AsType[*serverError](err)
		Expect(server.Error()).To(ContainSubstring(message))
	},
	Entry("its own", "Query memory limit exceeded: would use 32.37 MiB (attempt to allocate chunk of 28.07 MiB), maximum: 19.07 MiB.", sink.TooLarge),
	Entry("its own, in version 25.1", "(for query) memory limit exceeded: would use 32.37 MiB, maximum: 19.07 MiB.", sink.TooLarge),
	Entry("its own, in version 24", "Memory limit (for query) exceeded: would use 32.37 MiB, maximum: 19.07 MiB.", sink.TooLarge),
	Entry("its own, on another server", "Received from shard:9000. DB::Exception: Query memory limit exceeded: would use 32.37 MiB.", sink.TooLarge),
	Entry("the user's", "User memory limit exceeded: would use 32.31 MiB, maximum: 19.07 MiB."+
		" OvercommitTracker decision: Query was selected to stop by OvercommitTracker.", sink.Overloaded),
	Entry("the user's, in version 24", "Memory limit (for user) exceeded: would use 32.31 MiB.", sink.Overloaded),
	Entry("the server's", "(total) memory limit exceeded: would use 4.21 GiB, current RSS 184.33 GiB, maximum: 125.69 GiB.", sink.Overloaded),
	Entry("the server's, in version 24", "Memory limit (total) exceeded: would use 56.02 GiB.", sink.Overloaded),
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
