// Package faults simulates network faults between a program and a database.
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

	"github.com/diehard-outbox/diehard/internal/ports"
)

// Proxy passes TCP connections to a server, and can disturb them.
type Proxy struct {
	addr string

	mu       sync.Mutex
	target   string
	listener net.Listener // nil while the proxy is down
	links    map[*link]struct{}
	accepted int
	cut      int // number of bytes after which a connection breaks; 0 is no limit
	hold     hold
	vanish   bool
	speed    *rate.Limiter // nil means no limit
}

// hold describes the data that the proxy holds back.
type hold struct {
	direction Direction
	after     int           // holds back after a connection has sent this many bytes
	from      []byte        // if not nil, holds back this text and the data after it
	released  chan struct{} // nil if no hold is active
	bytes     int           // number of held bytes
}

// Direction is the direction of data.
type Direction int

// The directions.
const (
	Requests Direction = 1 << iota
	Answers
	Both = Requests | Answers
)

// StartProxy starts a proxy to target, a host:port. It ends with the spec.
func StartProxy(target string) *Proxy {
	ginkgo.GinkgoHelper()
	p := &Proxy{addr: ports.Reserve(), target: target, links: map[*link]struct{}{}}
	p.Up()
	ginkgo.DeferCleanup(func() {
		p.Down()
		p.Release()
		p.Throttle(0)
	})
	return p
}

// StartProxyTo starts a proxy to the server of dsn, which must be a URL. It
// returns the DSN of the proxy.
func StartProxyTo(dsn string) (p *Proxy, through string) {
	ginkgo.GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	p = StartProxy(u.Host)
	u.Host = p.addr
	return p, u.String()
}

// Addr returns the host and port of the proxy.
func (p *Proxy) Addr() string { return p.addr }

// Up accepts connections on the same address as before.
func (p *Proxy) Up() {
	ginkgo.GinkgoHelper()
	listener, err := new(net.ListenConfig).Listen(context.Background(), "tcp", p.addr)
	Expect(err).NotTo(HaveOccurred())
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listener, p.addr = listener, listener.Addr().String()
	go p.accept(listener)
}

// Down refuses new connections and breaks open connections.
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

// Reset breaks the open connections with a TCP reset, and still accepts new connections.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.reset()
	}
	clear(p.links)
}

// Lead sends new connections to another server.
func (p *Proxy) Lead(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = target
}

// Vanish silently drops all data in both directions. Existing connections are half-open,
// and so are new connections until Return.
func (p *Proxy) Vanish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.vanish = true
	for l := range p.links {
		l.vanished = true
	}
}

// Return ends Vanish for new connections. It closes the half-open connections
// on the client's side only, so the server keeps waiting for them.
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

// Throttle limits the total bytes per second; 0 removes the limit.
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

// Hold holds back data in a direction, until Release. It affects connections that send
// more than after bytes from now on. After Release the data arrive, even if the sender
// has disconnected.
func (p *Proxy) Hold(d Direction, after int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold = hold{direction: d, after: after, released: make(chan struct{})}
	p.countAnew()
}

// HoldFrom holds back the data of a connection when a request contains the given text.
// The held data begin with the text. The text must be short enough to arrive in one
// piece.
func (p *Proxy) HoldFrom(d Direction, text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold = hold{direction: d, from: []byte(text), released: make(chan struct{})}
	p.countAnew()
}

// Uncut reports whether CutOnce has not yet broken a connection.
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

// Connections returns the number of open connections. If no client opens new connections,
// zero means that all data have passed.
func (p *Proxy) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// Accepted returns the number of connections so far, including those that could
// not reach the server.
func (p *Proxy) Accepted() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.accepted
}

// Held returns the number of held bytes.
func (p *Proxy) Held() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hold.bytes
}

// Release passes the held data on.
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

// add adds an accepted connection, unless the proxy went down in the meantime.
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
	sent           int  // bytes of requests; proxy.mu guards this and the fields below
	begun          bool // the connection has sent the text of HoldFrom
	vanished       bool // its data are dropped
}

// pass copies data until one side ends or the connection must break.
func (l *link) pass(d Direction, to io.Writer, from io.Reader) {
	defer func() {
		if !l.lost() { // if the connection has vanished, the other side does not notice the end
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

// buffered is the size of the copy buffer.
const buffered = 32 << 10

// arrived waits until the proxy may pass the data on. It returns false if the connection
// must break.
func (l *link) arrived(d Direction, data []byte) (goOn bool) {
	released, speed, goOn := l.inspect(d, data)
	if !goOn {
		return false
	}
	if released != nil {
		<-released
	}
	if speed != nil {
		_ = speed.WaitN(context.Background(), len(data)) // cannot fail, the data are smaller than the burst
	}
	return true
}

func (l *link) inspect(d Direction, data []byte) (released <-chan struct{}, speed *rate.Limiter, goOn bool) {
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

// reset closes both sides with a TCP reset.
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
