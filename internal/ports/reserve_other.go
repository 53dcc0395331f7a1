//go:build !linux

// Package ports reserves ports for servers that a spec starts repeatedly.
package ports

import (
	"net"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// Reserve returns a local address, host:port, that is free at the moment. Only Linux
// can reserve a port.
func Reserve() (addr string) {
	GinkgoHelper()
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // returns at once
	Expect(err).NotTo(HaveOccurred())
	addr = listener.Addr().String()
	Expect(listener.Close()).To(Succeed())
	return addr
}
