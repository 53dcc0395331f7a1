package pqdriver_test

import (
	"encoding/binary"
	"net"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/postgres/internal/pqdriver"
)

var _ = Describe("a connection", func() {
	It("knows the process id that the server sent", func(ctx SpecContext) {
		const pid = 123_456
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		defer listener.Close()
		go func() {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			backendKeyData := binary.BigEndian.AppendUint32([]byte{'K', 0, 0, 0, 12}, pid)
			_, _ = client.Write(append([]byte{'R', 0, 0, 0, 8, 0, 0, 0, 0}, // AuthenticationOk
				append(backendKeyData, 0, 0, 0, 0, 'Z', 0, 0, 0, 5, 'I')...)) // ReadyForQuery
		}()

		connector, err := pqdriver.NewConnector(pqdriver.Options{DSN: "postgres://u@" + listener.Addr().String() + "/d?sslmode=disable"})
		Expect(err).NotTo(HaveOccurred())
		conn, err := connector.Connect(ctx)
		Expect(err).NotTo(HaveOccurred())
		defer conn.Close()
		sent, ok := pqdriver.BackendPID(conn)
		Expect(ok).To(BeTrue())
		Expect(sent).To(BeEquivalentTo(pid))
	})
})
