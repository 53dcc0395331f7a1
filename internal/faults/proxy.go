// Package faults makes the network between a program and a database fail.
package faults

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/url"
	"sync"

	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"golang.org/x/time/rate"
)

// Proxy passes TCP connections on to a server, and does not when told to.
type Proxy struct {
	addr string

	mu       sync.Mutex
	target   string
	listener net.Listener // nil while the proxy is down
	links    map[*link]struct{}
	accepted int
	cut      int // bytes that a connection may send before it breaks; 0 is no limit
	hold     hold
	vanish   bool
	speed    *rate.Limiter // nil is no limit
}

// hold is what of a connection does not arrive for now.
type hold struct {
	direction Direction
	after     int           // bytes that a connection has to send before
	from      []byte        // what it has to send before, instead
	released  chan struct{} // nil while nothing is held
	bytes     int           // held
}

// Direction is that of bytes on their way.
type Direction int

// Directions.
const (
	Requests Direction = 1 << iota
	Answers
	Both = Requests | Answers
)

// StartProxy starts a proxy to target, host:port, which ends with the spec.
func StartProxy(target string) *Proxy {
	ginkgo.GinkgoHelper()
	p := &Proxy{addr: reserveAddr(), target: target, links: map[*link]struct{}{}}
	p.Up()
	ginkgo.DeferCleanup(func() {
		p.Down()
		p.Release()
		p.Throttle(0)
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
	if p.listener != nil {
		_ = p.listener.Close()
		p.listener = nil
	}
	for l := range p.links {
		l.breakOff()
	}
	clear(p.links)
}

// Reset breaks the connections that are open, with a reset, and goes on taking
// others.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.reset()
	}
	clear(p.links)
}

// Lead makes new connections lead to another server.
func (p *Proxy) Lead(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = target
}

// Vanish loses whatever is sent in either direction, and tells nobody: the
// connections that are there are half-open, and so are those that are made until
// Return.
func (p *Proxy) Vanish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.vanish = true
	for l := range p.links {
		l.vanished = true
	}
}

// Return ends Vanish for connections that are made from now on. Of the others
// the clients are told; the server goes on waiting for them.
func (p *Proxy) Return() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.vanish = false
	for l := range p.links {
		if l.vanished {
			reset(l.client)
		}
	}
}

// Throttle lets so many bytes a second through in all; 0 is no limit.
func (p *Proxy) Throttle(bytesPerSecond int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.speed = nil
	if bytesPerSecond > 0 {
		p.speed = rate.NewLimiter(rate.Limit(bytesPerSecond), buffered)
	}
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

// HoldFrom is Hold on connections from when they send the text, with it. The
// text must be so short that it is sent at once.
func (p *Proxy) HoldFrom(d Direction, text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold = hold{direction: d, from: []byte(text), released: make(chan struct{})}
	p.countAnew()
}

// Uncut tells whether the connection that CutOnce is to break has not broken yet.
func (p *Proxy) Uncut() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cut > 0
}

func (p *Proxy) countAnew() {
	for l := range p.links {
		l.sent, l.begun = 0, false
	}
}

// Connections is how many are open: through a proxy to which nobody connects
// any more, everything has passed when none is left.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// Accepted is how many connections there have been, whether or not they could
// be passed on.
func (p *Proxy) Accepted() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.accepted
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
		p.mu.Lock()
		p.accepted++
		target := p.target
		p.mu.Unlock()
		server, err := new(net.Dialer).DialContext(context.Background(), "tcp", target)
		if err != nil {
			_ = client.Close()
			continue
		}
		l := &link{proxy: p, client: client, server: server}
		if !p.add(l, listener) {
			l.breakOff()
			return
		}
		go l.pass(Requests, server, client)
		go l.pass(Answers, client, server)
	}
}

// add adds a connection that the listener has accepted, unless the proxy went down
// meanwhile.
func (p *Proxy) add(l *link, listener net.Listener) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != listener {
		return false
	}
	p.links[l] = struct{}{}
	l.vanished = p.vanish
	return true
}

// link is one connection through the proxy.
type link struct {
	proxy          *Proxy
	client, server net.Conn
	sent           int  // bytes of requests, guarded by proxy.mu, like
	begun          bool // has sent what the hold begins with
	vanished       bool // what is lost
}

// pass copies until one side ends or the connection is to break.
func (l *link) pass(d Direction, to io.Writer, from io.Reader) {
	defer func() {
		if !l.lost() { // else the other side does not hear of the end
			l.close()
		}
	}()
	buffer := make([]byte, buffered)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			if goOn := l.arrived(d, buffer[:n]); !goOn {
				return
			}
			if l.lost() {
				continue
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

// buffered is how many bytes go at a time.
const buffered = 32 << 10

// arrived waits until bytes that go in the direction may go on, and says whether
// they may, or the connection is to break.
func (l *link) arrived(d Direction, data []byte) (goOn bool) {
	released, speed, goOn := l.look(d, data)
	if !goOn {
		return false
	}
	if released != nil {
		<-released
	}
	if speed != nil {
		_ = speed.WaitN(context.Background(), len(data)) // is within its burst
	}
	return true
}

func (l *link) look(d Direction, data []byte) (released <-chan struct{}, speed *rate.Limiter, goOn bool) {
	p := l.proxy
	p.mu.Lock()
	defer p.mu.Unlock()
	if d == Requests {
		l.sent += len(data)
		l.begun = l.begun || p.hold.from != nil && bytes.Contains(data, p.hold.from)
		if p.cut > 0 && l.sent > p.cut {
			p.cut = 0
			return nil, nil, false
		}
	}
	held := l.sent > p.hold.after
	if p.hold.from != nil {
		held = l.begun
	}
	if held && d&p.hold.direction != 0 {
		p.hold.bytes += len(data)
		released = p.hold.released
	}
	return released, p.speed, true
}

func (l *link) lost() bool {
	l.proxy.mu.Lock()
	defer l.proxy.mu.Unlock()
	return l.vanished
}

func (l *link) close() {
	l.breakOff()
	l.proxy.mu.Lock()
	defer l.proxy.mu.Unlock()
	delete(l.proxy.links, l)
}

// reset closes both sides without a farewell.
func (l *link) reset() {
	reset(l.client)
	reset(l.server)
}

func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

func (l *link) breakOff() {
	_ = l.client.Close()
	_ = l.server.Close()
}
