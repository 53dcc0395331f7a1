package faults

import (
	"net/netip"
	"syscall"

	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// reserveAddr returns a local address whose port the system gives to nobody else
// while the spec runs: a socket has it, and does not listen. Who asks for the
// address itself, as a proxy that was down, can listen there.
func reserveAddr() string {
	ginkgo.GinkgoHelper()
	socket, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	Expect(err).NotTo(HaveOccurred())
	ginkgo.DeferCleanup(syscall.Close, socket)
	// As a listener of package net has it: without it on both the second is refused.
	Expect(syscall.SetsockoptInt(socket, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)).To(Succeed())
	Expect(syscall.Bind(socket, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})).To(Succeed())
	bound, err := syscall.Getsockname(socket)
	Expect(err).NotTo(HaveOccurred())
	addr, ok := bound.(*syscall.SockaddrInet4)
	Expect(ok).To(BeTrue())
	return netip.AddrPortFrom(netip.AddrFrom4(addr.Addr), uint16(addr.Port)).String() //nolint:gosec // a port
}
