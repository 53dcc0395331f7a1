package page_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/relay"
	"github.com/diehard-outbox/diehard/pkg/relay/page"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

var suite = testengines.Start(testengines.Options{Postgres: true})

const (
	loopback = "127.0.0.1:9091"
	token    = "0123456789abcdef"
)

var _ = Describe("The page", func() {
	var (
		db     *sqlx.DB
		s      *store.Store
		log    *gbytes.Buffer
		client *http.Client
		ready  atomic.Pointer[error]
	)

	BeforeEach(func(ctx SpecContext) {
		db = testengines.OpenStore(suite.PostgresDSN(ctx), store.Session(30*time.Second))
		s = store.New(db, store.Options{MaxRows: 1000})
		log = gbytes.NewBuffer()
		jar, err := cookiejar.New(nil)
		Expect(err).NotTo(HaveOccurred())
		client = &http.Client{Jar: jar, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
		ready.Store(nil)
	})

	// serve serves a page until the spec ends. Calling stop stops it earlier.
	serve := func(addr, token string) (address string, stop func()) {
		GinkgoHelper()
		p := page.New(page.Options{
			Store: s, ID: uuid.New(), Version: "1.2.3", Addr: addr, Token: token,
			Log: slog.New(slog.NewTextHandler(log, nil)),
			Ready: func(context.Context) error {
				if err := ready.Load(); err != nil {
					return *err
				}
				return nil
			},
			Progress: func() relay.Progress { return relay.Progress{} },
		})
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() {
			p.Run(ctx)
			close(ended)
		}()
		server := httptest.NewServer(p)
		stop = func() {
			cancel()
			Eventually(ended).Should(BeClosed())
		}
		DeferCleanup(func() {
			stop()
			client.CloseIdleConnections()
			server.Close()
		})
		return server.URL, stop
	}

	type response struct {
		status int
		header http.Header
		body   string
	}
	send := func(ctx context.Context, method, address string, form url.Values, headers ...string) response {
		GinkgoHelper()
		request, err := http.NewRequestWithContext(ctx, method, address, strings.NewReader(form.Encode()))
		Expect(err).NotTo(HaveOccurred())
		if method == http.MethodPost {
			request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
		for i := 0; i+1 < len(headers); i += 2 {
			if request.Header.Set(headers[i], headers[i+1]); headers[i] == "Host" {
				request.Host = headers[i+1]
			}
		}
		received, err := client.Do(request)
		Expect(err).NotTo(HaveOccurred())
		defer received.Body.Close()
		body, err := io.ReadAll(received.Body)
		Expect(err).NotTo(HaveOccurred())
		return response{received.StatusCode, received.Header, string(body)}
	}
	get := func(ctx context.Context, address string, headers ...string) response {
		GinkgoHelper()
		return send(ctx, http.MethodGet, address, nil, headers...)
	}
	post := func(ctx context.Context, address string, form url.Values, headers ...string) response {
		GinkgoHelper()
		return send(ctx, http.MethodPost, address, form, headers...)
	}
	audited := func(ctx context.Context) (records []string) {
		GinkgoHelper()
		found, err := s.AuditLog(ctx, 100)
		Expect(err).NotTo(HaveOccurred())
		for _, record := range found {
			records = append(records, record.Actor+" "+record.Action+" "+string(record.Details))
		}
		return records
	}

	Describe("without a token", func() {
		It("exists on a loopback address for localhost only", func(ctx SpecContext) {
			address, _ := serve(loopback, "")
			shown := get(ctx, address)
			Expect(shown.status).To(Equal(200))
			Expect(shown.body).To(ContainSubstring("No relay is running: no event waits. Nothing is lost."))
			Expect(get(ctx, address, "Host", "localhost:9091").status).To(Equal(200))
			for _, host := range []string{"evil.example", "evil.example:9091", "localhost.evil.example", "10.0.0.1"} {
				Expect(get(ctx, address, "Host", host).status).To(Equal(403), host)
				Expect(post(ctx, address+"/pause", nil, "Host", host).status).To(Equal(403), host)
			}
			Expect(s.ReadPause(ctx)).To(BeNil())
		})

		It("does not exist on other addresses", func(ctx SpecContext) {
			Expect(page.Serves(":9091", "")).To(BeFalse())
			Expect(page.Serves(":9091", token)).To(BeTrue())
			Expect(page.Serves(loopback, "")).To(BeTrue())
			address, _ := serve(":9091", "")
			Expect(get(ctx, address).status).To(Equal(403))
		})
	})

	Describe("with a token", func() {
		login := func(ctx context.Context, address, name, token string) response {
			GinkgoHelper()
			return post(ctx, address+"/login", url.Values{"name": {name}, "token": {token}})
		}

		It("shows nothing before the login", func(ctx SpecContext) {
			address, _ := serve(loopback, token)
			for _, path := range []string{"/", "/batches", "/dead-letters", "/dead-letters/1", "/pause"} {
				refused := get(ctx, address+path)
				Expect(refused.status).To(Equal(303), path)
				Expect(refused.header.Get("Location")).To(Equal("/login"))
			}
			Expect(get(ctx, address+"/live").status).To(Equal(401))
			Expect(post(ctx, address+"/pause", nil).status).To(Equal(401))
			Expect(s.ReadPause(ctx)).To(BeNil())
		})

		It("admits an operator with a name and the token", func(ctx SpecContext) {
			address, _ := serve(":9091", token)
			refused := login(ctx, address, "ada", "not the token")
			Expect(refused.status).To(Equal(422))
			Expect(refused.body).To(ContainSubstring("This is not the token."))
			Expect(log).To(gbytes.Say(`level=WARN msg="login refused" name=ada remote=127\.0\.0\.1:\d+`))
			for _, name := range []string{"", " ", strings.Repeat("x", 65), "a\nb"} {
				Expect(login(ctx, address, name, token).status).To(Equal(422), name)
			}
			Expect(get(ctx, address).status).To(Equal(303))

			admitted := login(ctx, address, "ada", token)
			Expect(admitted.status).To(Equal(303))
			cookie := admitted.header.Get("Set-Cookie")
			Expect(cookie).To(And(ContainSubstring("HttpOnly"), ContainSubstring("SameSite=Strict"), Not(ContainSubstring("Secure")), Not(ContainSubstring(token))))
			Expect(get(ctx, address).body).To(ContainSubstring(`<span class="muted">ada</span>`))

			By("being admitted by every relay with the token")
			session, _, _ := strings.Cut(cookie, ";")
			other, _ := serve(":9091", token)
			client.Jar = nil
			Expect(get(ctx, other, "Cookie", session).status).To(Equal(200))
			another, _ := serve(":9091", "another token 123")
			Expect(get(ctx, another, "Cookie", session).status).To(Equal(303))
		})

		It("marks the cookie as secure behind TLS", func(ctx SpecContext) {
			address, _ := serve(":9091", token)
			admitted := post(ctx, address+"/login", url.Values{"name": {"ada"}, "token": {token}}, "X-Forwarded-Proto", "https")
			Expect(admitted.header.Get("Set-Cookie")).To(ContainSubstring("Secure"))
		})

		It("forgets the operator after the logout", func(ctx SpecContext) {
			address, _ := serve(":9091", token)
			Expect(login(ctx, address, "ada", token).status).To(Equal(303))
			Expect(get(ctx, address).status).To(Equal(200))
			Expect(post(ctx, address+"/logout", nil).status).To(Equal(303))
			Expect(get(ctx, address).status).To(Equal(303))
		})

		It("records the operator with each action", func(ctx SpecContext) {
			address, _ := serve(":9091", token)
			Expect(login(ctx, address, "ada", token).status).To(Equal(303))
			Expect(post(ctx, address+"/pause", nil).status).To(Equal(303))
			Expect(s.ReadPause(ctx)).To(HaveField("By", "ada@127.0.0.1"))
			Expect(get(ctx, address).body).To(ContainSubstring("Paused since "))
			Expect(post(ctx, address+"/resume", nil).status).To(Equal(303))
			Expect(get(ctx, address).body).NotTo(ContainSubstring("Paused since "))
			Expect(audited(ctx)).To(Equal([]string{"ada@127.0.0.1 resume {}", "ada@127.0.0.1 pause {}"}))
			Expect(log).To(gbytes.Say(`level=INFO msg="operator acted" action=pause actor=ada@127\.0\.0\.1`))
		})
	})

	It("refuses requests of other sites", func(ctx SpecContext) {
		address, _ := serve(loopback, "")
		for _, headers := range [][]string{
			{"Sec-Fetch-Site", "cross-site"},
			{"Sec-Fetch-Site", "same-site"},
			{"Origin", "https://evil.example"},
			{"Origin", "null"},
			{"Origin", "http://localhost:3000"},
		} {
			Expect(post(ctx, address+"/pause", nil, headers...).status).To(Equal(403), "%s", headers)
		}
		Expect(s.ReadPause(ctx)).To(BeNil())
		Expect(post(ctx, address+"/pause", nil, "Sec-Fetch-Site", "same-origin").status).To(Equal(303))
	})

	It("has headers that keep its content from other sites and caches", func(ctx SpecContext) {
		address, _ := serve(loopback, "")
		header := get(ctx, address).header
		Expect(header.Get("Content-Security-Policy")).To(And(HavePrefix("default-src 'none'; "), ContainSubstring("frame-ancestors 'none'"), Not(ContainSubstring("unsafe"))))
		Expect(header.Get("X-Content-Type-Options")).To(Equal("nosniff"))
		Expect(header.Get("Cache-Control")).To(Equal("no-store"))
		Expect(header.Get("Content-Type")).To(Equal("text/html; charset=utf-8"))
	})

	It("says that PostgreSQL is not available, and why this relay does not deliver", func(ctx SpecContext) {
		address, _ := serve(loopback, "")
		failure := errors.New("postgresql: <connection refused>")
		ready.Store(&failure)
		Expect(db.Close()).To(Succeed())
		shown := get(ctx, address)
		Expect(shown.status).To(Equal(200))
		Expect(shown.body).To(And(ContainSubstring("PostgreSQL is not available: "), ContainSubstring("This relay: postgresql: &lt;connection refused&gt;"),
			ContainSubstring("runbook.md#diehardpostgresqlfailing")))
		Expect(get(ctx, address+"/batches").status).To(Equal(503))
	})

	Describe("live", func() {
		type update struct {
			Healthy  bool              `json:"healthy"`
			Verdict  string            `json:"verdict"`
			Sections map[string]string `json:"sections"`
		}

		It("sends the sections that have changed, until the relay stops", func(ctx SpecContext) {
			address, stop := serve(loopback, "")
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, address+"/live", http.NoBody)
			Expect(err).NotTo(HaveOccurred())
			stream, err := client.Do(request)
			Expect(err).NotTo(HaveOccurred())
			defer stream.Body.Close()
			Expect(stream.Header.Get("Content-Type")).To(Equal("text/event-stream"))
			lines := bufio.NewScanner(stream.Body)
			lines.Buffer(nil, 1<<20)
			next := func() (now update) {
				GinkgoHelper()
				for lines.Scan() {
					if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
						Expect(json.Unmarshal([]byte(data), &now)).To(Succeed())
						return now
					}
				}
				Fail("the stream has ended")
				return now
			}
			first := next()
			Expect(first.Verdict).To(HavePrefix("No relay is running: "))
			Expect(first.Sections).To(And(HaveKey("verdict"), HaveKey("figures"), HaveKey("charts"), HaveKey("fleet"), HaveKey("batches"), HaveKey("letters"), HaveKey("actions")))

			Expect(s.Pause(ctx, "ada@laptop")).To(BeTrue())
			var paused update
			for !strings.HasPrefix(paused.Verdict, "Paused since ") {
				paused = next()
			}
			Expect(paused.Healthy).To(BeFalse())
			Expect(paused.Sections).To(And(HaveKeyWithValue("verdict", ContainSubstring("by ada@laptop")), HaveKeyWithValue("actions", ContainSubstring("ada@laptop: pause"))))
			Expect(paused.Sections).NotTo(HaveKey("letters"), "it has not changed")

			stop()
			for lines.Scan() {
				continue // to the end
			}
			Expect(lines.Err()).NotTo(HaveOccurred())
		})

		It("bounds the open pages", func(ctx SpecContext) {
			address, _ := serve(loopback, "")
			open := func() int {
				request, err := http.NewRequestWithContext(ctx, http.MethodGet, address+"/live", http.NoBody)
				Expect(err).NotTo(HaveOccurred())
				stream, err := client.Do(request)
				Expect(err).NotTo(HaveOccurred())
				DeferCleanup(stream.Body.Close)
				return stream.StatusCode
			}
			for range 32 {
				Expect(open()).To(Equal(200))
			}
			Expect(open()).To(Equal(503))
		})
	})

	Describe("of batches", func() {
		It("lists and shows them, and attempts or splits them", func(ctx SpecContext) {
			address, _ := serve(loopback, "")
			publish(ctx, db, 3)
			Expect(s.Cut(ctx, 0)).To(HaveField("Batches", 1))
			listed, err := s.Batches(ctx, "", 10)
			Expect(err).NotTo(HaveOccurred())
			id := listed[0].ID.String()
			Expect(get(ctx, address+"/batches").body).To(ContainSubstring(id))
			Expect(get(ctx, address+"/batches?state=waiting").body).To(ContainSubstring(id))
			Expect(get(ctx, address+"/batches?state=failing").body).To(And(Not(ContainSubstring(id)), ContainSubstring("No batch is in this state.")))
			Expect(get(ctx, address+"/batches?state=lost").status).To(Equal(404))
			Expect(get(ctx, address+"/batches/"+id).body).To(And(ContainSubstring("{[1,4)}"), ContainSubstring("waiting")))

			refused := post(ctx, address+"/batches/"+id+"/split", nil)
			Expect(refused.status).To(Equal(503))
			Expect(refused.body).To(ContainSubstring("split the batch: it has not been attempted yet"))
			Expect(audited(ctx)).To(BeEmpty())

			db.MustExec("UPDATE outbox_batches SET attempts = 1, failures = 1, last_attempt_at = clock_timestamp(), next_attempt_at = clock_timestamp() + interval '1 hour', last_error = '<script>'")
			Expect(get(ctx, address+"/batches?state=failing").body).To(And(ContainSubstring("&lt;script&gt;"), Not(ContainSubstring("<script>"))))
			Expect(post(ctx, address+"/batches/"+id+"/retry", nil).status).To(Equal(303))
			Expect(s.Batch(ctx, listed[0].ID)).To(HaveField("NextAttemptAt", BeNil()))
			Expect(post(ctx, address+"/batches/"+id+"/split", nil).status).To(Equal(303))
			details := ` {"batch_id": "` + id + `"}`
			Expect(audited(ctx)).To(Equal([]string{"operator@127.0.0.1 batch_split" + details, "operator@127.0.0.1 batch_retry" + details}))

			By("saying that a batch does not exist")
			for _, missing := range []string{uuid.NewString(), "7"} {
				Expect(get(ctx, address+"/batches/"+missing).status).To(Equal(404))
				Expect(post(ctx, address+"/batches/"+missing+"/retry", nil).body).To(ContainSubstring("This batch does not exist."))
			}
		})
	})

	Describe("of dead letters", func() {
		// add adds dead letters of a type.
		add := func(n int, eventType, cause string) {
			GinkgoHelper()
			db.MustExec(`INSERT INTO outbox_dead_letters (outbox_event_id, event_id, event_type, event_date_time, environment, event_context,
				metadata_version, published_at, batch_id, token, error)
				SELECT i, gen_random_uuid(), $2, now(), 'Test', '{"email": "<b>ada@example.com</b>"}', 1, now(), gen_random_uuid(), 'token', $3
				FROM generate_series(1, $1::int) AS i`, n, eventType, cause)
		}
		count := func() (letters, events int) {
			GinkgoHelper()
			Expect(db.Get(&letters, "SELECT count(*) FROM outbox_dead_letters")).To(Succeed())
			Expect(db.Get(&events, "SELECT count(*) FROM outbox_events")).To(Succeed())
			return letters, events
		}
		// confirmed sends the form of the page that asks for a confirmation.
		confirmed := func(asked response, more ...string) url.Values {
			GinkgoHelper()
			Expect(asked.status).To(Equal(200), asked.body)
			_, body, found := strings.Cut(asked.body, `action="/dead-letters/change"`)
			Expect(found).To(BeTrue(), asked.body)
			form := url.Values{}
			for _, match := range hidden.FindAllStringSubmatch(body, -1) {
				form.Add(match[1], match[2])
			}
			for i := 0; i+1 < len(more); i += 2 {
				form.Set(more[i], more[i+1])
			}
			return form
		}

		It("finds them by type, time and error, and shows a payload only when asked", func(ctx SpecContext) {
			address, _ := serve(loopback, "")
			Expect(get(ctx, address+"/dead-letters").body).To(ContainSubstring("ClickHouse has refused no event."))
			add(2, "paid", "too <long>")
			add(60, "sent", "no such column")
			db.MustExec("UPDATE outbox_dead_letters SET dead_lettered_at = now() - interval '3 days' WHERE event_type = 'paid'")
			Expect(get(ctx, address).body).To(And(ContainSubstring(`<a href="/dead-letters?type=sent">sent</a>`), ContainSubstring("62 dead letters wait for your decision")))

			rows := func(query string) []string {
				GinkgoHelper()
				var ids []string
				for _, match := range regexp.MustCompile(`href="/dead-letters/(\d+)"`).FindAllStringSubmatch(get(ctx, address+"/dead-letters"+query).body, -1) {
					ids = append(ids, match[1])
				}
				return ids
			}
			Expect(rows("")).To(And(HaveLen(50), HaveEach(Not(Equal("12"))), ContainElement("13"), ContainElement("62")), "the newest 50")
			Expect(rows("?before=13")).To(HaveLen(12))
			Expect(get(ctx, address+"/dead-letters?type=sent").body).To(ContainSubstring(`<a href="/dead-letters?before=13&amp;type=sent">10 older dead letters</a>`))
			Expect(rows("?type=paid")).To(Equal([]string{"2", "1"}))
			Expect(rows("?error=such+column&before=5")).To(Equal([]string{"4", "3"}))
			Expect(rows("?until=48h")).To(Equal([]string{"2", "1"}))
			Expect(rows("?since=48h&before=5")).To(Equal([]string{"4", "3"}))
			Expect(rows("?environment=Live")).To(BeEmpty())

			list := get(ctx, address+"/dead-letters?type=paid").body
			Expect(list).To(And(ContainSubstring("too &lt;long&gt;"), Not(ContainSubstring("ada@example.com"))))
			Expect(string(log.Contents())).NotTo(ContainSubstring("dead_letter_show"))
			Expect(get(ctx, address+"/dead-letters/1").body).To(ContainSubstring("{\n  &#34;email&#34;: &#34;&lt;b&gt;ada@example.com&lt;/b&gt;&#34;\n}"))
			Expect(log).To(gbytes.Say(`msg="operator acted" action=dead_letter_show actor=operator@127.0.0.1 dead_letter_id=1`))
			Expect(get(ctx, address+"/dead-letters/99").status).To(Equal(404))
		})

		It("retries the selected, after a confirmation", func(ctx SpecContext) {
			address, _ := serve(loopback, "")
			add(3, "paid", "too long")
			asked := post(ctx, address+"/dead-letters/confirm", url.Values{"change": {"retry"}, "id": {"1", "3"}})
			Expect(asked.body).To(ContainSubstring("Retry 2 dead letters?"))
			Expect(count()).To(Equal(3), "nothing has changed yet")
			done := post(ctx, address+"/dead-letters/change", confirmed(asked))
			Expect(done.body).To(And(ContainSubstring("2 dead letters retried."), ContainSubstring("</html>")))
			letters, events := count()
			Expect([]int{letters, events}).To(Equal([]int{1, 2}))
			Expect(audited(ctx)).To(Equal([]string{`operator@127.0.0.1 dead_letters_retry {"last_id": 3, "first_id": 1, "dead_letters": 2}`}))
			Expect(log).To(gbytes.Say(`msg="operator acted" action=dead_letters_retry actor=operator@127.0.0.1 dead_letters=2 first_id=1 last_id=3`))

			By("changing nothing that somebody else has changed")
			again := post(ctx, address+"/dead-letters/change", confirmed(asked))
			Expect(again.status).To(Equal(422))
			Expect(again.body).To(ContainSubstring("Nothing is selected"))
		})

		It("discards all that match, after the number was entered", func(ctx SpecContext) {
			address, _ := serve(loopback, "")
			add(250, "paid", "too long")
			add(2, "sent", "too long")
			asked := post(ctx, address+"/dead-letters/confirm", url.Values{"change": {"discard"}, "scope": {"all"}, "type": {"paid"}, "since": {"1h"}})
			Expect(asked.body).To(ContainSubstring("Discard 250 dead letters?"))
			add(5, "paid", "refused while the operator reads the question")
			for _, number := range []string{"", "249", "255"} {
				refused := post(ctx, address+"/dead-letters/change", confirmed(asked, "count", number))
				Expect(refused.status).To(Equal(422))
				Expect(refused.body).To(ContainSubstring("Enter the number of dead letters, 250, to discard them."))
			}
			Expect(audited(ctx)).To(BeEmpty())
			done := post(ctx, address+"/dead-letters/change", confirmed(asked, "count", "250"))
			Expect(done.body).To(ContainSubstring("250 dead letters discarded."))
			letters, events := count()
			Expect([]int{letters, events}).To(Equal([]int{7, 0}))
		})

		It("says how many it has changed before an error", func(ctx SpecContext) {
			address, _ := serve(loopback, "")
			add(300, "paid", "too long")
			db.MustExec(`CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
				BEGIN IF OLD.id = 250 THEN RAISE 'the disk is full'; END IF; RETURN OLD; END $$`)
			db.MustExec("CREATE TRIGGER refuse BEFORE DELETE ON outbox_dead_letters FOR EACH ROW EXECUTE FUNCTION refuse()")
			asked := post(ctx, address+"/dead-letters/confirm", url.Values{"change": {"discard"}, "scope": {"all"}})
			done := post(ctx, address+"/dead-letters/change", confirmed(asked, "count", "300"))
			Expect(done.body).To(And(ContainSubstring("200 dead letters of 300 discarded. Then: discard dead letters: "), ContainSubstring("the disk is full")))
			letters, _ := count()
			Expect(letters).To(Equal(100))
		})

		It("does not delay the verdict by actions that take long", func(ctx SpecContext) {
			address, _ := serve(loopback, "")
			add(2, "paid", "too long")
			tx, err := db.BeginTxx(ctx, nil)
			Expect(err).NotTo(HaveOccurred())
			_, err = tx.ExecContext(ctx, "SELECT FROM outbox_dead_letters FOR UPDATE")
			Expect(err).NotTo(HaveOccurred())
			ended := make(chan string, 2)
			for _, id := range []string{"1", "2"} { // as many actions as run at a time
				form := confirmed(post(ctx, address+"/dead-letters/confirm", url.Values{"change": {"discard"}, "id": {id}}), "count", "1")
				go func() {
					defer GinkgoRecover()
					ended <- post(ctx, address+"/dead-letters/change", form).body
				}()
			}
			Eventually(func() (waiting int, err error) {
				return waiting, db.GetContext(ctx, &waiting, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
			}).Should(Equal(2))
			Expect(get(ctx, address).body).To(ContainSubstring("No relay is running"))
			Expect(tx.Rollback()).To(Succeed())
			for range 2 {
				Eventually(ended).Should(Receive(ContainSubstring("1 dead letter discarded.")))
			}
		})

		It("refuses invalid forms", func(ctx SpecContext) {
			address, _ := serve(loopback, "")
			add(1, "paid", "too long")
			Expect(post(ctx, address+"/dead-letters/confirm", url.Values{"change": {"retry"}}).body).To(ContainSubstring("Nothing is selected"))
			Expect(post(ctx, address+"/dead-letters/confirm", url.Values{"change": {"drop"}, "scope": {"all"}}).status).To(Equal(404))
			Expect(post(ctx, address+"/dead-letters/confirm", url.Values{"change": {"retry"}, "id": {"x"}}).status).To(Equal(404))
			for query, problem := range map[string]string{
				"?since=yesterday": "Since must be a time such as", "?until=-1h": "Until must be a time", "?event=7": "Event ID must be a UUID", "?batch=7": "Batch ID must be a UUID",
			} {
				refused := get(ctx, address+"/dead-letters"+query)
				Expect(refused.status).To(Equal(422), query)
				Expect(refused.body).To(ContainSubstring(problem))
			}
			Expect(post(ctx, address+"/login", url.Values{"name": {strings.Repeat("x", 70_000)}}).status).NotTo(Equal(200))
			letters, _ := count()
			Expect(letters).To(Equal(1))
		})

		It("mends the fuse", func(ctx SpecContext) {
			address, _ := serve(loopback, "")
			Expect(post(ctx, address+"/fuse/mend", nil).status).To(Equal(303))
			Expect(audited(ctx)).To(BeEmpty(), "the fuse has not blown")
			db.MustExec("UPDATE outbox_fuse SET blown_at = now()")
			_, err := s.Poll(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(get(ctx, address+"/dead-letters").body).To(ContainSubstring("The fuse has blown"))
			Expect(post(ctx, address+"/fuse/mend", nil).status).To(Equal(303))
			Expect(audited(ctx)).To(Equal([]string{"operator@127.0.0.1 fuse_mend {}"}))
		})
	})
})

var hidden = regexp.MustCompile(`<input type="hidden" name="([^"]*)" value="([^"]*)">`)

func publish(ctx context.Context, db *sqlx.DB, n int) {
	GinkgoHelper()
	tx, err := db.BeginTxx(ctx, nil)
	Expect(err).NotTo(HaveOccurred())
	events := make([]outbox.Event, n)
	for i := range events {
		events[i], err = outbox.NewEvent(map[string]int{"n": i}, outbox.WithType("thing_happened"))
		Expect(err).NotTo(HaveOccurred())
	}
	Expect(outbox.NewPublisher(outbox.PublisherOptions{}).Publish(ctx, tx, events...)).To(Succeed())
	Expect(tx.Commit()).To(Succeed())
}
