package users_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/url"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// proxyLosingCommits starts a proxy to the database that closes a connection at the
// statement COMMIT, and returns its DSN. If forward is true, the server receives the
// statement, but the client does not receive the reply. Otherwise the server does not
// receive the statement.
func proxyLosingCommits(ctx context.Context, dsn string, forward bool) string {
	GinkgoHelper()
	target, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(listener.Close)
	address := target.Host
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go loseAtCommit(client, address, forward)
		}
	}()
	target.Host = listener.Addr().String()
	return target.String()
}

func loseAtCommit(client net.Conn, address string, forward bool) {
	defer client.Close()
	server, err := new(net.Dialer).DialContext(context.Background(), "tcp", address)
	if err != nil {
		return
	}
	defer server.Close()
	replies := make(chan struct{})
	go func() {
		defer close(replies)
		_, _ = io.Copy(client, server)
	}()
	buffer := make([]byte, 64<<10)
	for {
		n, err := client.Read(buffer)
		if err != nil {
			return
		}
		if bytes.Contains(buffer[:n], []byte("COMMIT\x00")) {
			client.Close()
			if forward {
				_, _ = server.Write(buffer[:n])
				<-replies // the copy ends at the reply because the client is closed
			}
			return
		}
		if _, err := server.Write(buffer[:n]); err != nil {
			return
		}
	}
}
