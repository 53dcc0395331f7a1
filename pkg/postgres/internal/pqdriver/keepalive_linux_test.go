package pqdriver_test

import (
	"net"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"golang.org/x/sys/unix"

	"github.com/diehard-outbox/diehard/pkg/postgres/internal/pqdriver"
)

var _ = Describe("the dialer", func() {
	It("makes the kernel detect a dead server", func(ctx SpecContext) {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		Expect(err).NotTo(HaveOccurred())
		defer listener.Close()
		conn, err := pqdriver.Dial(ctx, "tcp", listener.Addr().String())
		Expect(err).NotTo(HaveOccurred())
		defer conn.Close()

		Expect(conn).To(BeAssignableToTypeOf(&net.TCPConn{}))
		raw, err := conn.(*net.TCPConn).SyscallConn()
		Expect(err).NotTo(HaveOccurred())
		option := func(level, name int) (value int) {
			Expect(raw.Control(func(fd uintptr) {
				value, err = unix.GetsockoptInt(int(fd), level, name)
			})).To(Succeed())
			Expect(err).NotTo(HaveOccurred())
			return value
		}
		Expect(option(unix.SOL_SOCKET, unix.SO_KEEPALIVE)).To(Equal(1))
		idle, interval, count := option(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE),
			option(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL), option(unix.IPPROTO_TCP, unix.TCP_KEEPCNT)
		Expect(idle + interval*count).To(BeNumerically("==", pqdriver.DeadAfter.Seconds()))
		Expect(option(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)).To(BeNumerically("==", pqdriver.DeadAfter.Milliseconds()))
	})
})
