package clickhouse

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/ClickHouse/ch-go/proto"
	chgo "github.com/ClickHouse/clickhouse-go/v2"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// transport is a protocol of ClickHouse, with or without TLS.
type transport struct {
	http, secure bool
}

// String returns the form of a DSN for the transport.
func (t transport) String() string {
	switch t {
	case transport{http: true, secure: true}:
		return "https://"
	case transport{http: true}:
		return "http://"
	case transport{secure: true}:
		return "clickhouse://, with secure=true"
	default:
		return "clickhouse://"
	}
}

// name returns the transport's name for messages.
func (t transport) name() string {
	name := "the native protocol"
	if t.http {
		name = "HTTP"
	}
	if t.secure {
		return name + " with TLS"
	}
	return name
}

// probeTimeout bounds the probe of one transport.
const probeTimeout = 2 * time.Second

// checkTransport returns a *sink.MisconfiguredError if the server at the DSN's address
// speaks another protocol than the DSN. Without this check, the driver's error is a
// timeout or the end of the connection. cause is the error of a statement. If it has
// another reason, checkTransport returns it.
func (s *Sink) checkTransport(ctx context.Context, cause error) error {
	if ctx.Err() != nil {
		return cause
	}
	if _, responded := errors.AsType[*serverError](cause); responded {
		return cause
	}
	ours := transport{http: s.http, secure: s.secure}
	for _, address := range s.addresses {
		if !s.reachable(ctx, address) || s.speaks(ctx, address, ours) {
			continue
		}
		for _, other := range []transport{{http: !ours.http, secure: ours.secure}, {http: ours.http, secure: !ours.secure}, {http: !ours.http, secure: !ours.secure}} {
			if s.speaks(ctx, address, other) {
				return &sink.MisconfiguredError{
					Problem: fmt.Sprintf("the clickhouse dsn requires %s, and the port of %s speaks %s", ours.name(), address, other.name()),
					Remedy:  fmt.Sprintf("begin the dsn with %s, or change the port: ClickHouse's defaults are 9000 and 9440 (TLS) for the native protocol, and 8123 and 8443 (TLS) for HTTP", other),
				}
			}
		}
	}
	return cause
}

func (s *Sink) reachable(ctx context.Context, address string) bool {
	conn, err := (&net.Dialer{Timeout: probeTimeout}).DialContext(ctx, "tcp", address)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}

// speaks returns whether the server at the address responds in the transport.
func (s *Sink) speaks(ctx context.Context, address string, t transport) bool {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var (
		conn net.Conn
		err  error
	)
	if t.secure {
		// Only the protocol matters here: no secret is sent, and no response is trusted.
		dialer := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // as above
		conn, err = dialer.DialContext(ctx, "tcp", address)
	} else {
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", address)
	}
	if err != nil {
		return false
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	if t.http {
		if _, err := io.WriteString(conn, "GET /ping HTTP/1.1\r\nHost: "+address+"\r\nConnection: close\r\n\r\n"); err != nil {
			return false
		}
		status, err := bufio.NewReader(conn).ReadString('\n')
		// The native port of ClickHouse responds with the status 400.
		return err == nil && strings.HasPrefix(status, "HTTP/") && !strings.Contains(status, " 400 ")
	}
	var hello proto.Buffer
	(proto.ClientHello{Name: "diehard", ProtocolVersion: chgo.ClientTCPProtocolVersion, User: "diehard-check"}).Encode(&hello)
	if _, err := conn.Write(hello.Buf); err != nil {
		return false
	}
	first := make([]byte, 1)
	_, err = io.ReadFull(conn, first)
	return err == nil && (first[0] == byte(proto.ServerCodeHello) || first[0] == byte(proto.ServerCodeException))
}
