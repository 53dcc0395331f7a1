package pqdriver_test

import (
	"encoding/binary"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

func TestPqdriver(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "pqdriver")
}

// backendPID is the process id that the server of startServer sends.
const backendPID = 123_456

// startServer starts a server that accepts one client and passes it to serve. It
// returns the DSN of the server. The server stops when the spec ends.
func startServer(serve func(client net.Conn)) (dsn string) {
	GinkgoHelper()
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // ends with the spec
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(listener.Close)
	go func() {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		defer client.Close()
		length := make([]byte, 4) // of the startup message, including the length
		if _, err := io.ReadFull(client, length); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, client, int64(binary.BigEndian.Uint32(length))-4); err != nil {
			return
		}
		if _, err := client.Write(slices.Concat(
			[]byte{'R', 0, 0, 0, 8, 0, 0, 0, 0},                                                     // AuthenticationOk
			binary.BigEndian.AppendUint32([]byte{'K', 0, 0, 0, 12}, backendPID), []byte{0, 0, 0, 0}, // BackendKeyData
			readyForQuery,
		)); err != nil {
			return
		}
		serve(client)
	}()
	return "postgres://u@" + listener.Addr().String() + "/d?sslmode=disable"
}

var readyForQuery = []byte{'Z', 0, 0, 0, 5, 'I'}
