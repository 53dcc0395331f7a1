package devstack

import (
	"net"
	"strconv"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = Describe("A reserved port", func() {
	It("is assigned to no other process, even while its server is down", func(ctx SpecContext) {
		port, release, err := reservePort(ctx)
		Expect(err).NotTo(HaveOccurred())
		address := net.JoinHostPort(loopback, strconv.Itoa(port))
		// The system never assigns a bound port. A listener without SO_REUSEADDR shows
		// that the port is bound.
		other := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) (err error) {
			controlErr := raw.Control(func(socket uintptr) {
				err = syscall.SetsockoptInt(int(socket), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 0)
			})
			if controlErr != nil {
				return controlErr
			}
			return err
		}}
		for range 2 {
			_, err = other.Listen(ctx, "tcp4", address)
			Expect(err).To(MatchError(syscall.EADDRINUSE))
			listener, err := new(net.ListenConfig).Listen(ctx, "tcp4", address)
			Expect(err).NotTo(HaveOccurred())
			Expect(listener.Close()).To(Succeed())
		}

		release()
		listener, err := other.Listen(ctx, "tcp4", address)
		Expect(err).NotTo(HaveOccurred())
		Expect(listener.Close()).To(Succeed())
	})
})
