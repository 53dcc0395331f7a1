package chaos_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"golang.org/x/sys/unix"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("While ClickHouse is dead and events wait, a relay", func() {
	It("holds no transaction open, inserts nothing, logs nothing and uses little CPU time, even after many probes", func(ctx SpecContext) {
		const probes, ticksPerProbe, workers = 30, 3, 2
		s := newSystem(ctx)
		proxy, through := faults.StartProxyTo(s.ClickHouse.Native)
		relay := s.Relay(through, slices.Concat(small, brisk, []string{fmt.Sprintf("DIEHARD_RELAY_WORKERS=%d", workers)})...)
		proxy.Lead("127.0.0.1:1")
		proxy.Reset()
		Expect(s.Publish(ctx, system.Events(10*perBatch)...)).To(Succeed())
		awaitNotReady(ctx, relay)
		probed := func(n int) {
			GinkgoHelper()
			before := proxy.Accepted()
			Eventually(ctx, func(g Gomega) {
				g.Expect(proxy.Accepted()).To(BeNumerically(">=", before+n))
			}).WithTimeout(patience).Should(Succeed())
		}
		attempts := func() (n int) {
			GinkgoHelper()
			Expect(s.Postgres.Get(&n, "SELECT sum(attempts) FROM outbox_batches")).To(Succeed())
			return n
		}
		Eventually(ctx, complaints).WithArguments(relay).WithTimeout(patience).ShouldNot(BeZero())
		probed(5)
		linesBefore, ticksBefore, probesBefore := complaints(relay), cpuTicks(relay), proxy.Accepted()
		for range probes {
			probed(1)
			var open int
			// A statement of the relay's loops is a transaction, too, but is not left open.
			Expect(s.Postgres.Get(&open, `SELECT count(*) FROM pg_stat_activity
				WHERE datname = current_database() AND application_name = 'diehard-relay' AND state LIKE 'idle in transaction%'`)).To(Succeed())
			Expect(open).To(BeZero(), "open transactions")
		}
		ticks, done := cpuTicks(relay)-ticksBefore, proxy.Accepted()-probesBefore
		Expect(complaints(relay)).To(Equal(linesBefore), "lines in the log")
		Expect(attempts()).To(BeNumerically("<=", workers), "attempts, at most one for each worker")
		Expect(ticks).To(BeNumerically("<=", ticksPerProbe*done), "hundredths of a second of CPU time, in %d probes", done)
		expectBacklog(ctx, s)

		proxy.Lead(hostOf(s.ClickHouse.Native))
		awaitReady(ctx, relay)
		expectOnce(ctx, s, outcome{Fault: "dead while events wait", Done: "ClickHouse", Events: 10 * perBatch})
	})

	It("probes ClickHouse with one connection at a time, even if many workers wait", func(ctx SpecContext) {
		s := newSystem(ctx)
		Expect(s.Publish(ctx, system.Events(10*perBatch)...)).To(Succeed())
		silent := listenSilently(ctx)
		relay := s.LaunchRelay("clickhouse://"+silent.Addr().String()+"?dial_timeout=500ms",
			slices.Concat(small, []string{"DIEHARD_RELAY_WORKERS=8"})...)
		Eventually(ctx, silent.accepted).WithTimeout(patience).Should(BeNumerically(">=", 5))
		Expect(silent.together()).To(Equal(1))
		relay.Stop()
		s.Relay(s.ClickHouse.Native, small...)
		expectOnce(ctx, s, outcome{Fault: "unresponsive, 8 workers", Done: "ClickHouse", Events: 10 * perBatch})
	})
})

var _ = Describe("While ClickHouse is dead, the API", func() {
	It("creates users without a connection to ClickHouse and without its address", func(ctx SpecContext) {
		s := newSystem(ctx)
		relay := s.LaunchRelay("clickhouse://127.0.0.1:1", small...)
		api := s.API()
		users := createUsers(ctx, api, 500)
		environment, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", api.Command.Process.Pid))
		Expect(err).NotTo(HaveOccurred())
		Expect(string(environment)).To(And(ContainSubstring("DIEHARD_POSTGRES_DSN"), Not(ContainSubstring("CLICKHOUSE"))))
		for range 20 {
			users.awaitMore(ctx, perBatch/5)
			Expect(peers(api)).To(HaveEach(hostOf(s.PostgresDSN)))
		}
		_, failed := users.counts()
		Expect(failed).To(BeZero(), "failed requests")
		relay.Stop()
		s.Relay(s.ClickHouse.Native, small...)
		users.expectEach(ctx, s, outcome{Fault: "dead while users are created", Done: "ClickHouse"})
	})
})

// complaints counts the program's warning and error records.
func complaints(p *programs.Process) (n int) {
	GinkgoHelper()
	for _, record := range p.Log() {
		if record["level"] == "WARN" || record["level"] == "ERROR" {
			n++
		}
	}
	return n
}

// cpuTicks returns the program's CPU time in hundredths of a second.
//
// https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
func cpuTicks(p *programs.Process) (ticks int) {
	GinkgoHelper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Command.Process.Pid))
	Expect(err).NotTo(HaveOccurred())
	_, afterName, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(afterName) // begins with the third field
	for _, field := range fields[14-3 : 16-3] {
		n, err := strconv.Atoi(field)
		Expect(err).NotTo(HaveOccurred())
		ticks += n
	}
	return ticks
}

// peers returns the addresses that the program has connected to.
//
// https://www.kernel.org/doc/html/latest/networking/proc_net_tcp.html
func peers(p *programs.Process) (addresses []string) {
	GinkgoHelper()
	process := fmt.Sprintf("/proc/%d", p.Command.Process.Pid)
	files, err := os.ReadDir(process + "/fd")
	Expect(err).NotTo(HaveOccurred())
	own := map[string]bool{}
	for _, file := range files {
		if target, err := os.Readlink(process + "/fd/" + file.Name()); err == nil { // the file may be closed by now
			own[target] = true
		}
	}
	const local, remote, state, inode = 1, 2, 3, 9
	var sockets [][]string
	listening := map[string]bool{}
	for _, name := range []string{"tcp", "tcp6"} {
		table, err := os.ReadFile(process + "/net/" + name)
		Expect(err).NotTo(HaveOccurred())
		for line := range strings.Lines(string(table)) {
			fields := strings.Fields(line)
			if len(fields) <= inode || !own["socket:["+fields[inode]+"]"] {
				continue
			}
			if fields[state] == "0A" { // TCP_LISTEN
				listening[fields[local]] = true
				continue
			}
			sockets = append(sockets, fields)
		}
	}
	Expect(listening).To(HaveLen(2), "the API's port and the admin port")
	for _, fields := range sockets {
		if !listening[fields[local]] { // a connection to a listening socket is a client's
			addresses = append(addresses, parseSocket(fields[remote]))
		}
	}
	Expect(addresses).NotTo(BeEmpty())
	return addresses
}

// parseSocket converts an IPv4 address of the kernel's table to host:port.
func parseSocket(text string) string {
	GinkgoHelper()
	var address [4]byte
	var port uint16
	_, err := fmt.Sscanf(text, "%02X%02X%02X%02X:%04X", &address[3], &address[2], &address[1], &address[0], &port)
	Expect(err).NotTo(HaveOccurred(), text)
	return net.JoinHostPort(net.IP(address[:]).String(), strconv.Itoa(int(port)))
}

// silence is a server that accepts connections and never responds.
type silence struct {
	net.Listener

	mu    sync.Mutex
	open  []*net.TCPConn
	taken int
	most  int // the largest number of connections that were open at the same time
}

// listenSilently starts a silence, which stops at the end of the spec.
func listenSilently(ctx context.Context) *silence {
	GinkgoHelper()
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	Expect(err).NotTo(HaveOccurred())
	s := &silence{Listener: listener}
	DeferCleanup(listener.Close)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			s.take(conn.(*net.TCPConn))
		}
	}()
	return s
}

func (s *silence) take(conn *net.TCPConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open = slices.DeleteFunc(s.open, func(earlier *net.TCPConn) bool {
		ended := hasEnded(earlier)
		if ended {
			_ = earlier.Close()
		}
		return ended
	})
	s.open = append(s.open, conn)
	s.taken++
	s.most = max(s.most, len(s.open))
}

func (s *silence) accepted() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taken
}

func (s *silence) together() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.most
}

// hasEnded reports, without waiting, whether the other side has closed the
// connection. If the other side closed it before a new connect, the close is always
// visible here.
func hasEnded(conn *net.TCPConn) (ended bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	_ = raw.Read(func(fd uintptr) bool {
		buffer := make([]byte, 4<<10)
		for {
			n, err := unix.Read(int(fd), buffer)
			if n <= 0 {
				ended = err != unix.EAGAIN
				return true
			}
		}
	})
	return ended
}
