package clickhouse_test

import (
	"io"
	"net"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
)

var _ = Describe("A connection whose handshake fails", func() {
	It("is closed", func(ctx SpecContext) {
		listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(listener.Close)
		ended := make(chan error, 1)
		go func() {
			conn, err := listener.Accept()
			if err == nil {
				defer conn.Close()
				_, err = io.Copy(io.Discard, conn)
			}
			ended <- err
		}()
		sink, err := clickhouse.Open(clickhouse.Options{DSN: "clickhouse://" + listener.Addr().String() + "?dial_timeout=100ms"})
		Expect(err).NotTo(HaveOccurred())
		Expect(sink.Ping(ctx)).NotTo(Succeed())
		// The limit is shorter than a cycle of the garbage collector, which would also
		// close the connection.
		Eventually(ctx, ended).WithTimeout(10 * time.Second).Should(Receive(BeNil()))
		Expect(sink.Close()).To(Succeed())
	})
})
