// Package faults makes the network between a program and a database fail.
package faults

import (
	"context"
	"io"
	"net"
	"net/url"
	"sync"

	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// Proxy passes TCP connections on to a server, and does not when told to.
type Proxy struct {
	addr, target string

	mu       sync.Mutex
	listener net.Listener
	links    map[*link]struct{}
	cut      int // bytes that a connection may send before it breaks; 0 is no limit
	hold     hold
}

// hold is what of a connection does not arrive for now.
type hold struct {
	direction Direction
	after     int           // bytes that a connection has to send before
	released  chan struct{} // nil while nothing is held
	bytes     int           // held
}

// Direction is that of bytes on their way.
type Direction int

// Directions.
const (
	Requests Direction = iota + 1
	Answers
)

// StartProxy starts a proxy to target, host:port, which ends with the spec.
func StartProxy(target string) *Proxy {
	ginkgo.GinkgoHelper()
	p := &Proxy{addr: "127.0.0.1:0", target: target, links: map[*link]struct{}{}}
	p.Up()
	ginkgo.DeferCleanup(func() {
		p.Down()
		p.Release()
	})
	return p
}

// StartProxyTo starts a proxy to the server that dsn, a URL, leads to, and
// returns the DSN that leads through it.
func StartProxyTo(dsn string) (p *Proxy, through string) {
	ginkgo.GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	p = StartProxy(u.Host)
	u.Host = p.addr
	return p, u.String()
}

// Addr is the host and port that the proxy listens at.
func (p *Proxy) Addr() string { return p.addr }

// Up accepts connections, on the same address as before.
func (p *Proxy) Up() {
	ginkgo.GinkgoHelper()
	listener, err := new(net.ListenConfig).Listen(context.Background(), "tcp", p.addr)
	Expect(err).NotTo(HaveOccurred())
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listener, p.addr = listener, listener.Addr().String()
	go p.accept(listener)
}

// Down refuses connections and breaks those that are open.
func (p *Proxy) Down() {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = p.listener.Close()
	for l := range p.links {
		l.breakOff()
	}
	clear(p.links)
}

// CutOnce breaks the next connection that sends more than n bytes from now on.
func (p *Proxy) CutOnce(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = n
	p.countAnew()
}

// Hold keeps what goes in that direction, on connections that have sent more
// than after bytes from now on, until Release. It arrives then, also if who
// sent it is gone.
func (p *Proxy) Hold(d Direction, after int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold = hold{direction: d, after: after, released: make(chan struct{})}
	p.countAnew()
}

func (p *Proxy) countAnew() {
	for l := range p.links {
		l.sent = 0
	}
}

// Connections is how many are open: through a proxy to which nobody connects
// any more, everything has passed when none is left.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// Held is how many bytes are held.
func (p *Proxy) Held() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hold.bytes
}

// Release lets through what is held.
func (p *Proxy) Release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hold.released != nil {
		close(p.hold.released)
	}
	p.hold = hold{}
}

func (p *Proxy) accept(listener net.Listener) {
	for {
		client, err := listener.Accept()
		if err != nil {
			return
		}
		server, err := new(net.Dialer).DialContext(context.Background(), "tcp", p.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		l := &link{proxy: p, client: client, server: server}
		p.mu.Lock()
		p.links[l] = struct{}{}
		p.mu.Unlock()
		go l.pass(Requests, server, client)
		go l.pass(Answers, client, server)
	}
}

// link is one connection through the proxy.
type link struct {
	proxy          *Proxy
	client, server net.Conn
	sent           int // bytes of requests, guarded by proxy.mu
}

// pass copies until one side ends or the connection is to break.
func (l *link) pass(d Direction, to io.Writer, from io.Reader) {
	defer l.close()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			released, goOn := l.arrived(d, n)
			if !goOn {
				return
			}
			if released != nil {
				<-released
			}
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// arrived says what is to be done with bytes that go in the direction: wait
// until they are released, or break the connection.
func (l *link) arrived(d Direction, n int) (released <-chan struct{}, goOn bool) {
	p := l.proxy
	p.mu.Lock()
	defer p.mu.Unlock()
	if d == Requests {
		l.sent += n
		if p.cut > 0 && l.sent > p.cut {
			p.cut = 0
			return nil, false
		}
	}
	if d != p.hold.direction || l.sent <= p.hold.after {
		return nil, true
	}
	p.hold.bytes += n
	return p.hold.released, true
}

func (l *link) close() {
	l.breakOff()
	l.proxy.mu.Lock()
	defer l.proxy.mu.Unlock()
	delete(l.proxy.links, l)
}

func (l *link) breakOff() {
	_ = l.client.Close()
	_ = l.server.Close()
}
