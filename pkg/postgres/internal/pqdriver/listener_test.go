package pqdriver_test

import (
	"context"
	"io"
	"net"
	"time"

	"github.com/lib/pq"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/postgres/internal/pqdriver"
)

var _ = Describe("A listener", func() {
	var (
		pings    chan struct{} // receives each ping that has reached the server
		reply    chan struct{}
		listener *pqdriver.Listener
		stop     context.CancelFunc
	)

	BeforeEach(func(ctx SpecContext) {
		arrived, replies := make(chan struct{}, 10), make(chan struct{})
		DeferCleanup(func() { close(replies) })
		pings, reply = arrived, replies
		connected := make(chan struct{}, 1)
		dsn := startServer(func(client net.Conn) {
			ping := make([]byte, len("Q\x00\x00\x00\x05\x00"))
			for {
				if _, err := io.ReadFull(client, ping); err != nil {
					return
				}
				arrived <- struct{}{}
				<-replies
				_, _ = client.Write(append([]byte{'I', 0, 0, 0, 4}, readyForQuery...)) // EmptyQueryResponse
			}
		})
		var listening context.Context
		listening, stop = context.WithCancel(context.WithoutCancel(ctx))
		DeferCleanup(stop)
		var err error
		listener, err = pqdriver.NewListener(listening, pqdriver.ListenerOptions{
			DSN: dsn,
			Event: func(event pq.ListenerEventType, _ error) {
				if event == pq.ListenerEventConnected {
					connected <- struct{}{}
				}
			},
		})
		Expect(err).NotTo(HaveOccurred())
		Eventually(ctx, connected).Should(Receive())
	})

	// ping calls Ping until a ping reaches the server. Ping has no effect while the
	// listener is disconnected or another ping waits.
	ping := func(ctx context.Context) {
		GinkgoHelper()
		Eventually(ctx, func() chan struct{} {
			listener.Ping()
			return pings
		}).Should(Receive())
	}

	It("pings without waiting for the reply, one ping at a time", SpecTimeout(time.Minute), func(ctx SpecContext) {
		ping(ctx)
		listener.Ping()
		Eventually(ctx, reply).Should(BeSent(struct{}{}))
		Consistently(ctx, pings).WithTimeout(100 * time.Millisecond).ShouldNot(Receive())
		ping(ctx)
	})

	It("ends with its context while a ping waits for the reply", SpecTimeout(time.Minute), func(ctx SpecContext) {
		ping(ctx)
		stop()
		Eventually(ctx, listener.Notify).Should(BeClosed())
	})
})
