package httpapi_test

import (
	"bufio"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/httpapi"
)

var _ = Describe("Problems", func() {
	DescribeTable("report an unknown path",
		func(ctx SpecContext, path string) {
			expectProblem(start(ctx).get(ctx, path), http.StatusNotFound, "not-found")
		},
		Entry("at the root", "/"),
		Entry("below /v1", "/v1/"),
		Entry("with a trailing slash", "/v1/users/"),
		Entry("below a user", "/v1/users/0190c2f0-7f3a-7cc1-b0a8-2b7a3f2f6c11/events"),
		Entry("in another case", "/v1/Users"),
		Entry("with an encoded slash", "/v1%2Fusers"),
	)

	DescribeTable("report an unsupported method, and list the supported ones",
		func(ctx SpecContext, method, path string, allow ...any) {
			refused := start(ctx).do(ctx, method, path, nil)
			expectProblem(refused, http.StatusMethodNotAllowed, "method-not-allowed")
			Expect(strings.Split(refused.header.Get("Allow"), ", ")).To(ConsistOf(allow...))
		},
		Entry("DELETE", http.MethodDelete, "/v1/users", "OPTIONS", "GET", "HEAD", "POST"),
		Entry("POST to a user", http.MethodPost, "/v1/users/1", "OPTIONS", "GET", "HEAD", "PATCH", "DELETE"),
		Entry("PUT of a user", http.MethodPut, "/v1/users/1", "OPTIONS", "GET", "HEAD", "PATCH", "DELETE"),
		Entry("PUT of many users", http.MethodPut, "/v1/users/batch", "OPTIONS", "PATCH", "POST"),
		Entry("PUT to a deletion", http.MethodPut, "/v1/users/batch/delete", "OPTIONS", "POST"),
		Entry("a method that HTTP does not define", "FROB", "/v1/users", "OPTIONS", "GET", "HEAD", "POST"),
		Entry("TRACE", http.MethodTrace, "/v1/users", "OPTIONS", "GET", "HEAD", "POST"),
	)

	It("are not the response to OPTIONS, which lists the methods", func(ctx SpecContext) {
		api := start(ctx)
		for path, methods := range map[string][]string{
			"/v1/users": {"GET", "HEAD", "POST"}, "/v1/users/" + unknownID: {"GET", "HEAD", "PATCH", "DELETE"},
			"/v1/users/batch": {"POST", "PATCH"}, "/v1/users/batch/delete": {"POST"},
		} {
			options := api.do(ctx, http.MethodOptions, path, nil)
			Expect(options.status).To(Equal(http.StatusNoContent))
			Expect(strings.Split(options.header.Get("Allow"), ", ")).To(ConsistOf(append(methods, "OPTIONS")), path)
		}
	})

	It("hide the text of a panic, and do not stop the server", func(ctx SpecContext) {
		api := start(ctx, func(o *httpapi.Options) { o.Users = nil })
		for range 2 {
			problem := expectProblem(api.create(ctx, `{"email":"ada@example.com"}`),
				http.StatusInternalServerError, "internal-error")
			Expect(problem["detail"]).NotTo(ContainSubstring("nil"))
			Eventually(api.log).WithContext(ctx).Should(gbytes.Say(
				`"level":"ERROR","msg":"request failed","err":"panic: runtime error: invalid memory address.*` +
					`"request_id":"` + problem["request_id"].(string) + `","stack":"[^"]*users.\(\*Service\).Create`))
		}
	})

	It("hide the errors of the database", func(ctx SpecContext) {
		_, err := db.ExecContext(ctx, "ALTER TABLE users RENAME TO hidden")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func(ctx SpecContext) {
			_, err := db.ExecContext(ctx, "ALTER TABLE hidden RENAME TO users")
			Expect(err).NotTo(HaveOccurred())
		})
		api := start(ctx)
		failed := api.get(ctx, "/v1/users")
		expectProblem(failed, http.StatusInternalServerError, "internal-error")
		Expect(failed.body).NotTo(ContainSubstring("relation"))
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"err":"list users: .*relation`))
	})

	Describe("of a slow request", func() {
		It("report the timeout, and PostgreSQL cancels the statement", func(ctx SpecContext) {
			release := lockUsers(ctx)
			api := start(ctx, func(o *httpapi.Options) { o.RequestTimeout = 100 * time.Millisecond })
			late := api.create(ctx, `{"email":"ada@example.com"}`)
			expectProblem(late, http.StatusGatewayTimeout, "timeout")
			Expect(late.header.Get("Retry-After")).To(Equal("1"))
			expectProblem(api.get(ctx, "/v1/users"), http.StatusGatewayTimeout, "timeout")
			Eventually(ctx, waitingForLock).WithArguments(ctx).Should(BeZero())
			release()
			Expect(count(ctx, "users")).To(BeZero())
			Expect(count(ctx, "outbox_events")).To(BeZero())
		})

		It("report a slow body, and the server closes the connection", func(ctx SpecContext) {
			api := start(ctx, func(o *httpapi.Options) { o.ReadTimeout = 100 * time.Millisecond })
			connection, err := net.Dial("tcp", api.Addr())
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(connection.Close)
			fmt.Fprintf(connection, "POST /v1/users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 30\r\n\r\n{")
			Eventually(gbytes.BufferReader(connection)).WithContext(ctx).Should(gbytes.Say(`HTTP/1.1 408 Request Timeout\r\n(?s:.*)#request-timeout`))
			Eventually(ctx, func() error { _, err := connection.Write([]byte{' '}); return err }).Should(HaveOccurred())
		})

		It("are not sent to a client whose headers are slow", func(ctx SpecContext) {
			api := start(ctx, func(o *httpapi.Options) { o.ReadHeaderTimeout = 100 * time.Millisecond })
			connection, err := net.Dial("tcp", api.Addr())
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(connection.Close)
			fmt.Fprintf(connection, "POST /v1/users HTTP/1.1\r\nHost: ")
			Eventually(ctx, func() error { _, err := bufio.NewReader(connection).ReadByte(); return err }).Should(HaveOccurred())
		})
	})

	It("are not used for headers above 64 KiB, which the HTTP server refuses", func(ctx SpecContext) {
		api := start(ctx)
		send := func(bytes int) *gbytes.Buffer {
			GinkgoHelper()
			connection, err := net.Dial("tcp", api.Addr())
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(connection.Close)
			// The server may close the connection before it has read all headers.
			go fmt.Fprintf(connection, "GET /v1/users HTTP/1.1\r\nHost: localhost\r\nX-Long: %s\r\n\r\n", strings.Repeat("x", bytes))
			return gbytes.BufferReader(connection)
		}
		Eventually(send(60 << 10)).WithContext(ctx).Should(gbytes.Say(`HTTP/1.1 200 OK`))
		Eventually(send(70 << 10)).WithContext(ctx).Should(gbytes.Say(`HTTP/1.1 431 Request Header Fields Too Large`))
	})

	It("report a truncated body", func(ctx SpecContext) {
		api := start(ctx)
		connection, err := net.Dial("tcp", api.Addr())
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(connection.Close)
		fmt.Fprintf(connection, "POST /v1/users HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nno length\r\n")
		Eventually(gbytes.BufferReader(connection)).WithContext(ctx).Should(gbytes.Say(`HTTP/1.1 400 Bad Request\r\n(?s:.*)#malformed-request`))
	})

	It("are not server errors if the client has closed the connection", func(ctx SpecContext) {
		lockUsers(ctx)
		api := start(ctx)
		connection, err := net.Dial("tcp", api.Addr())
		Expect(err).NotTo(HaveOccurred())
		fmt.Fprintf(connection, "GET /v1/users HTTP/1.1\r\nHost: localhost\r\n\r\n")
		Eventually(ctx, waitingForLock).WithArguments(ctx).Should(Equal(1))
		Expect(connection.Close()).To(Succeed())
		Eventually(api.log).WithContext(ctx).Should(gbytes.Say(`"msg":"request".*"status":499`))
		Expect(string(api.log.Contents())).NotTo(ContainSubstring("ERROR"))
		Eventually(ctx, waitingForLock).WithArguments(ctx).Should(BeZero())
	})

	Describe("of the database", func() {
		It("are reported at once while it is down, and end when it is back", func(ctx SpecContext) {
			own := testengines.StartPostgres(ctx, nil)
			ownDB := testengines.OpenPostgres(own.DSN(), nil)
			Expect(testengines.Schema.Migrate(ctx, ownDB.DB, slog.New(slog.DiscardHandler))).To(Succeed())
			api := start(ctx, func(o *httpapi.Options) {
				onDatabase(ownDB)(o)
				// A response after the timeout would be another problem.
				o.RequestTimeout = time.Minute
			})
			Expect(api.create(ctx, `{"email":"a@example.com"}`).status).To(Equal(http.StatusCreated))

			own.Kill()
			for range 3 {
				down := api.create(ctx, `{"email":"b@example.com"}`)
				expectProblem(down, http.StatusServiceUnavailable, "unavailable")
				Expect(down.header.Get("Retry-After")).To(Equal("1"))
				expectProblem(api.get(ctx, "/v1/users"), http.StatusServiceUnavailable, "unavailable")
			}

			own.Start(ctx)
			Eventually(ctx, func() int { return api.create(ctx, `{"email":"b@example.com"}`).status }).
				Should(Equal(http.StatusCreated))
		})

		It("say that the outcome is unknown if the connection is lost during the commit", func(ctx SpecContext) {
			// PostgreSQL ends the session during the commit.
			_, err := db.ExecContext(ctx, `
				CREATE FUNCTION cut_off() RETURNS trigger LANGUAGE plpgsql AS
					$$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;
				CREATE CONSTRAINT TRIGGER cut_off AFTER INSERT ON users
					DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION cut_off()`)
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(func(ctx SpecContext) {
				_, err := db.ExecContext(ctx, "DROP FUNCTION cut_off CASCADE")
				Expect(err).NotTo(HaveOccurred())
			})
			unknown := start(ctx).create(ctx, `{"email":"ada@example.com"}`)
			expectProblem(unknown, http.StatusServiceUnavailable, "outcome-unknown")
			Expect(unknown.header.Get("Retry-After")).To(Equal("1"))
		})
	})
})
