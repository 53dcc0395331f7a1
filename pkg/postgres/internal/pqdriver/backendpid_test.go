package pqdriver_test

import (
	"io"
	"net"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/postgres/internal/pqdriver"
)

var _ = Describe("A connection", func() {
	It("has the process id that the server sent", func(ctx SpecContext) {
		connector, err := pqdriver.NewConnector(pqdriver.Options{DSN: startServer(func(client net.Conn) {
			_, _ = io.Copy(io.Discard, client)
		})})
		Expect(err).NotTo(HaveOccurred())
		conn, err := connector.Connect(ctx)
		Expect(err).NotTo(HaveOccurred())
		defer conn.Close()
		pid, ok := pqdriver.BackendPID(conn)
		Expect(ok).To(BeTrue())
		Expect(pid).To(BeEquivalentTo(backendPID))
	})
})
