package sinktest

import (
	"io"
	"net"
	"sync"

	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// proxy passes TCP connections on, and breaks them when told to.
type proxy struct {
	addr, target string

	mu       sync.Mutex
	listener net.Listener
	conns    map[net.Conn]struct{}
	// Bytes that a connection may send before it is cut, or before nothing is
	// answered any more; 0 is no limit.
	cut, swallow int
}

func startProxy(target string) *proxy {
	ginkgo.GinkgoHelper()
	p := &proxy{addr: "127.0.0.1:0", target: target, conns: make(map[net.Conn]struct{})}
	p.up()
	ginkgo.DeferCleanup(p.down)
	return p
}

// up accepts connections, on the same address as before.
func (p *proxy) up() {
	ginkgo.GinkgoHelper()
	listener, err := net.Listen("tcp", p.addr)
	Expect(err).NotTo(HaveOccurred())
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listener, p.addr = listener, listener.Addr().String()
	go p.accept(listener)
}

// down refuses connections and breaks those that are open.
func (p *proxy) down() {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.listener.Close()
	for conn := range p.conns {
		_ = conn.Close()
	}
	clear(p.conns)
}

// cutOnce breaks the next connection that sends more than n bytes.
func (p *proxy) cutOnce(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = n
}

// swallowAfter keeps the answers back on connections that have sent more than n
// bytes.
func (p *proxy) swallowAfter(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.swallow = n
}

func (p *proxy) accept(listener net.Listener) {
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", p.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		p.mu.Lock()
		p.conns[client], p.conns[server] = struct{}{}, struct{}{}
		p.mu.Unlock()
		l := &link{proxy: p, client: client, server: server}
		go l.pass(server, client, l.sent)
		go l.pass(client, server, l.answered)
	}
}

// link is one connection through the proxy.
type link struct {
	proxy          *proxy
	client, server net.Conn
	up             int // bytes sent, guarded by proxy.mu
}

// pass copies until one side ends or decide says to break the connection. What
// decide does not want is read and dropped.
func (l *link) pass(to io.Writer, from io.Reader, decide func(n int) (forward, goOn bool)) {
	defer l.close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			forward, goOn := decide(n)
			if !goOn {
				return
			}
			if forward {
				if _, err := to.Write(buffer[:n]); err != nil {
					return
				}
			}
		}
		if err != nil {
			return
		}
	}
}

func (l *link) sent(n int) (forward, goOn bool) {
	l.proxy.mu.Lock()
	defer l.proxy.mu.Unlock()
	l.up += n
	if l.proxy.cut > 0 && l.up > l.proxy.cut {
		l.proxy.cut = 0
		return false, false
	}
	return true, true
}

func (l *link) answered(int) (forward, goOn bool) {
	l.proxy.mu.Lock()
	defer l.proxy.mu.Unlock()
	return l.proxy.swallow == 0 || l.up <= l.proxy.swallow, true
}

func (l *link) close() {
	_ = l.client.Close()
	_ = l.server.Close()
	l.proxy.mu.Lock()
	defer l.proxy.mu.Unlock()
	delete(l.proxy.conns, l.client)
	delete(l.proxy.conns, l.server)
}
