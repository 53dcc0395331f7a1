// Package ports reserves ports for servers that a spec starts repeatedly.
package ports

import (
	"net/netip"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// Reserve returns a local address, host:port. The system gives the port to no other
// program until the spec ends, because a bound socket that does not listen holds the
// port. A server that sets SO_REUSEADDR, as package net does, can listen on the port
// repeatedly.
func Reserve() (addr string) {
	GinkgoHelper()
	socket, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(syscall.Close, socket)
	// The system refuses the second socket unless both sockets have the option.
	Expect(syscall.SetsockoptInt(socket, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)).To(Succeed())
	Expect(syscall.Bind(socket, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})).To(Succeed())
	bound, err := syscall.Getsockname(socket)
	Expect(err).NotTo(HaveOccurred())
	address, ok := bound.(*syscall.SockaddrInet4)
	Expect(ok).To(BeTrue())
	return netip.AddrPortFrom(netip.AddrFrom4(address.Addr), uint16(address.Port)).String() //nolint:gosec // a port
}
