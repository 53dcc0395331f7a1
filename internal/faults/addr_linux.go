package faults

import (
	"net/netip"
	"syscall"

	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// reserveAddr returns a local address whose port the system assigns to no other
// process while the spec runs. A bound socket that does not listen holds the
// port. A proxy that was down can still listen on the address.
func reserveAddr() string {
	ginkgo.GinkgoHelper()
	socket, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	Expect(err).NotTo(HaveOccurred())
	ginkgo.DeferCleanup(syscall.Close, socket)
	// Listeners of package net set SO_REUSEADDR. The second bind fails unless
	// both sockets set it.
	Expect(syscall.SetsockoptInt(socket, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)).To(Succeed())
	Expect(syscall.Bind(socket, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})).To(Succeed())
	bound, err := syscall.Getsockname(socket)
	Expect(err).NotTo(HaveOccurred())
	addr, ok := bound.(*syscall.SockaddrInet4)
	Expect(ok).To(BeTrue())
	return netip.AddrPortFrom(netip.AddrFrom4(addr.Addr), uint16(addr.Port)).String() //nolint:gosec // a port number is small
}
