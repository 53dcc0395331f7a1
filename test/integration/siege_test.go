package integration_test

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("An API with 10,000 idle connections and clients that never finish their requests", Label("long"), func() {
	const idle, slow = 10_000, 500

	It("responds to other clients, even during a database outage, and recovers afterwards", func(ctx SpecContext) {
		s := newSystem(ctx)
		proxy, dsn := faults.StartProxyTo(s.PostgresDSN)
		api := s.API("DIEHARD_POSTGRES_DSN="+dsn, "DIEHARD_HTTP_IDLE_TIMEOUT=10m")
		addr := strings.TrimPrefix(api.URL(), "http://")
		var all []net.Conn
		DeferCleanup(func() {
			for _, connection := range all {
				_ = connection.Close()
			}
		})
		connect := func() net.Conn {
			connection, err := net.Dial("tcp", addr)
			Expect(err).NotTo(HaveOccurred())
			all = append(all, connection)
			return connection
		}
		post := func(email string) (system.Response, error) {
			return system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: email})
		}

		By("opening the connections with one request each")
		connections := make([]net.Conn, idle)
		var group errgroup.Group
		group.SetLimit(50)
		for i := range connections {
			connections[i] = connect()
			group.Go(func() error { return ask(connections[i]) })
		}
		Expect(group.Wait()).To(Succeed())

		By("starting requests and never finishing them")
		var unfinished []net.Conn
		for i := range slow {
			connection := connect()
			unfinished = append(unfinished, connection)
			if i%2 == 0 {
				fmt.Fprint(connection, "POST /v1/users HTTP/1.1\r\nHost: ")
			} else {
				fmt.Fprint(connection, "POST /v1/users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
			}
		}

		system.Create(ctx, api, system.NewUser{Email: "ada@example.com"})
		proxy.Down()
		a, err := post("bob@example.com")
		Expect(err).NotTo(HaveOccurred())
		Expect(a.Status).To(Equal(http.StatusServiceUnavailable))
		Expect(a.Headers.Get("Retry-After")).To(Equal("1"))
		proxy.Up()
		Eventually(ctx, func() (int, error) {
			a, err := post("bob@example.com")
			return a.Status, err
		}).WithTimeout(patience).Should(Equal(http.StatusCreated))

		By("closing slow connections and keeping idle ones")
		for _, connection := range unfinished {
			Eventually(ctx, func() error { _, err := connection.Write([]byte{' '}); return err }).WithTimeout(patience).Should(HaveOccurred())
		}
		for i := 0; i < idle; i += idle / 100 {
			Expect(ask(connections[i])).To(Succeed())
		}
	})
})

// ask sends a request on the connection. The API needs no database for its response.
func ask(connection net.Conn) error {
	if err := connection.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := fmt.Fprint(connection, "GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReader(connection), nil)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusNotFound {
		return fmt.Errorf("unexpected status %s", response.Status)
	}
	return nil
}
