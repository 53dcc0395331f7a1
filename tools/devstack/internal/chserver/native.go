package chserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// displayName is the server's name in the handshake.
const displayName = "devstack"

// serveNative serves clients of the native protocol until ctx is canceled.
func (s *Server) serveNative(ctx context.Context) error {
	var clients sync.WaitGroup
	defer clients.Wait()
	stop := context.AfterFunc(ctx, func() { _ = s.native.Close() })
	defer stop()
	for {
		conn, err := s.native.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("serve the native protocol: %w", err)
		}
		clients.Go(func() { s.serveClient(ctx, conn) })
	}
}

func (s *Server) serveClient(ctx context.Context, conn net.Conn) {
	closed := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		if closed() {
			_ = conn.Close()
		}
	}()

	c := newNativeClient(s, conn)
	defer c.release()
	err := c.serve(ctx)
	if err != nil && ctx.Err() == nil && !errors.Is(err, io.EOF) {
		s.log.WarnContext(ctx, "native connection broken", "remote", conn.RemoteAddr().String(), "err", err)
	}
}

// nativeClient is one connection of the native protocol. Like a connection to
// clickhouse-server it is a session: the effects of USE and SET and the
// temporary tables stay.
type nativeClient struct {
	server   *Server
	conn     *impatientConn
	revision int
	session  *chengine.Session
	// sets holds the SET statements that the client ran.
	sets []string
	// inserted holds the columns of the last INSERT.
	inserted described

	wire   *blockReader // the client's bytes
	frames *blockReader // the client's bytes, decompressed
	out    proto.Buffer // the next bytes for the client

	packets chan packet // receives the awaited packet
	waiting bool
	pending *packet // a packet that arrived during a query
}

// packet is the beginning of a client's message.
type packet struct {
	code proto.ClientCode
	err  error
}

func newNativeClient(s *Server, conn net.Conn) *nativeClient {
	impatient := &impatientConn{Conn: conn}
	return &nativeClient{
		server:  s,
		conn:    impatient,
		wire:    newBlockReader(impatient, 0, s.version),
		packets: make(chan packet, 1),
	}
}

func (c *nativeClient) release() {
	if c.session != nil {
		c.session.Close()
	}
}

// serve serves the client until the connection ends.
func (c *nativeClient) serve(ctx context.Context) error {
	if err := c.handshake(ctx); err != nil {
		return err
	}
	for {
		p := c.receive()
		if p.err != nil {
			return p.err
		}
		switch p.code {
		case proto.ClientCodePing:
			proto.ServerCodePong.Encode(&c.out)
			if err := c.flush(); err != nil {
				return err
			}
		case proto.ClientCodeQuery:
			if err := c.serveQuery(ctx); err != nil {
				return err
			}
		case proto.ClientCodeCancel:
			// The cancel arrived after the query had ended.
		default:
			return c.fail(newException(proto.ErrUnknownPacketFromClient, "UNKNOWN_PACKET_FROM_CLIENT", "Unknown packet %d from client", p.code))
		}
	}
}

// handshake reads the client's hello packet and sends the server's hello packet.
func (c *nativeClient) handshake(ctx context.Context) error {
	first := c.receive()
	if first.err != nil {
		return first.err
	}
	if first.code == 'G' || first.code == 'P' {
		// The client sent GET or POST. clickhouse-server sends the same text.
		fmt.Fprintf(&bufferWriter{&c.out}, "HTTP/1.0 400 Bad Request\r\n\r\n%s is for clickhouse-client program\r\nYou must use %s for HTTP.\r\n",
			c.server.NativeAddr(), c.server.HTTPAddr())
		return c.flush()
	}
	if first.code != proto.ClientCodeHello {
		return c.fail(newException(proto.ErrUnexpectedPacketFromClient, "UNEXPECTED_PACKET_FROM_CLIENT", "Unexpected packet %d from client: expected Hello", first.code))
	}

	var hello proto.ClientHello
	if err := hello.Decode(c.wire.Reader); err != nil {
		return fmt.Errorf("read the hello packet: %w", err)
	}
	c.revision = min(hello.ProtocolVersion, proto.Version)
	c.wire.revision = c.revision
	if err := c.server.credentials.check(hello.User, hello.Password); err != nil {
		return c.fail(err)
	}
	session, err := c.server.engine.NewSession()
	if err != nil {
		return c.fail(err)
	}
	c.session = session
	if err := use(ctx, session, hello.Database); err != nil {
		return c.fail(err)
	}

	v := c.server.version
	(&proto.ServerHello{
		Name:        "ClickHouse",
		Major:       v.major,
		Minor:       v.minor,
		Patch:       v.patch,
		Revision:    proto.Version,
		Timezone:    v.timezone,
		DisplayName: displayName,
	}).EncodeAware(&c.out, c.revision)
	if err := c.flush(); err != nil {
		return err
	}
	if proto.FeatureAddendum.In(c.revision) {
		if _, err := c.wire.Str(); err != nil { // a quota key
			return fmt.Errorf("read the addendum: %w", err)
		}
	}
	return nil
}

// fail sends an exception and returns the error that ends the connection.
func (c *nativeClient) fail(err error) error {
	c.appendException(err)
	return errors.Join(err, c.flush())
}

func (c *nativeClient) appendException(err error) {
	exception := asException(err)
	proto.ServerCodeException.Encode(&c.out)
	(&proto.Exception{
		Code:    exception.Code,
		Name:    "DB::Exception",
		Message: "DB::Exception: " + exception.Message,
	}).EncodeAware(&c.out, c.revision)
}

// flush sends the content of out.
func (c *nativeClient) flush() error {
	_, err := c.conn.Write(c.out.Buf)
	c.out.Reset()
	if err != nil {
		return fmt.Errorf("send to the client: %w", err)
	}
	return nil
}

// receive waits for the client's next packet.
func (c *nativeClient) receive() packet {
	if p := c.pending; p != nil {
		c.pending = nil
		return *p
	}
	p := <-c.next()
	c.waiting = false
	return p
}

// next starts to wait for a packet, unless a wait is already in progress.
func (c *nativeClient) next() <-chan packet {
	if !c.waiting {
		c.waiting = true
		go func() {
			code, err := c.wire.UVarInt()
			if err == nil && code > 0xff {
				err = fmt.Errorf("unknown packet %d", code)
			}
			c.packets <- packet{code: proto.ClientCode(code), err: err} //nolint:gosec // checked
		}()
	}
	return c.packets
}

// watch cancels a query when the client cancels it or disconnects. It watches
// until the returned function is called.
func (c *nativeClient) watch(cancel func()) (stop func()) {
	packets, ended := c.next(), make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		select {
		case p := <-packets:
			c.waiting = false
			if p.err != nil || p.code == proto.ClientCodeCancel {
				cancel()
			}
			if p.err != nil || p.code != proto.ClientCodeCancel {
				c.pending = &p
			}
		case <-ended:
		}
	})
	return func() {
		close(ended)
		watching.Wait()
	}
}

type bufferWriter struct{ *proto.Buffer }

func (b *bufferWriter) Write(p []byte) (int, error) {
	b.PutRaw(p)
	return len(p), nil
}
