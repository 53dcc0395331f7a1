package chaos_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"golang.org/x/time/rate"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

// clients create users and tolerate any response of the API.
type clients struct {
	url   atomic.Value // a string, the API's address
	keyed bool         // each request has a key and is repeated until its outcome is known
	stop  func()

	mu        sync.Mutex
	created   map[string]string // addresses by user id
	failed    int
	responses map[string]int // counts by status and problem
}

var loads atomic.Int64

// createUsers creates users at the rate perSecond, or slower if the API is
// slower.
func createUsers(ctx context.Context, api *programs.Process, perSecond rate.Limit) *clients {
	GinkgoHelper()
	return (&clients{}).start(ctx, api, perSecond)
}

// createUsersOnce is like createUsers, with an idempotency key for each user.
func createUsersOnce(ctx context.Context, api *programs.Process, perSecond rate.Limit) *clients {
	GinkgoHelper()
	return (&clients{keyed: true}).start(ctx, api, perSecond)
}

func (c *clients) start(ctx context.Context, api *programs.Process, perSecond rate.Limit) *clients {
	GinkgoHelper()
	const atOnce = 4
	pace := rate.NewLimiter(perSecond, 1)
	c.created, c.responses = map[string]string{}, map[string]int{}
	c.url.Store(api.URL())
	var stopped atomic.Bool
	var group sync.WaitGroup
	load := loads.Add(1) // clients of the same database create different users
	var n atomic.Int64
	for range atOnce {
		group.Go(func() {
			for !stopped.Load() && pace.Wait(ctx) == nil {
				email := fmt.Sprintf("user-%d-%d@example.com", load, n.Add(1))
				for !c.create(ctx, email) && pace.Wait(ctx) == nil {
				}
			}
		})
	}
	c.stop = func() {
		stopped.Store(true)
		group.Wait()
	}
	DeferCleanup(c.stop)
	return c
}

// create sends a request. It reports whether the outcome for this user is
// final.
func (c *clients) create(ctx context.Context, email string) bool {
	var headers []string
	if c.keyed {
		headers = []string{"Idempotency-Key: " + email}
	}
	a, err := system.Post(ctx, c.url.Load().(string)+"/v1/users", system.NewUser{Email: email}, headers...)
	c.record(email, a, err)
	return !c.keyed || err == nil && a.Status < http.StatusInternalServerError && a.Headers.Get("Retry-After") == ""
}

func (c *clients) record(email string, a system.Response, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		kind, _ := a.Body["type"].(string)
		c.responses[strings.TrimSpace(fmt.Sprint(a.Status, " ", kind[strings.Index(kind, "#")+1:]))]++
	}
	id, ok := a.Body["id"].(string)
	if err == nil && a.Status == http.StatusCreated && ok {
		c.created[id] = email
	} else {
		c.failed++
	}
}

func (c *clients) counts() (created, failed int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.created), c.failed
}

// awaitMore waits until n more users were created.
func (c *clients) awaitMore(ctx context.Context, n int) {
	GinkgoHelper()
	before, _ := c.counts()
	Eventually(ctx, func() int { created, _ := c.counts(); return created - before }).
		WithTimeout(patience).WithPolling(5 * time.Millisecond).Should(BeNumerically(">=", n))
}

// awaitFailure waits for another failed request.
func (c *clients) awaitFailure(ctx context.Context) {
	GinkgoHelper()
	_, before := c.counts()
	Eventually(ctx, func() int { _, failed := c.counts(); return failed }).WithTimeout(patience).Should(BeNumerically(">", before))
}

// awaitResponse waits for another response with this status and problem, for example
// "503 unavailable".
func (c *clients) awaitResponse(ctx context.Context, response string) {
	GinkgoHelper()
	count := func() int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.responses[response]
	}
	before := count()
	Eventually(ctx, count).WithTimeout(patience).Should(BeNumerically(">", before), response)
}

// expectResponses expects that every error response states the outcome of the
// request, and whether to repeat the request.
func (c *clients) expectResponses() {
	GinkgoHelper()
	c.mu.Lock()
	defer c.mu.Unlock()
	expected := []string{"201", "503 unavailable", "503 outcome-unknown", "504 timeout"}
	if c.keyed {
		expected = append(expected, "409 idempotency-key-in-use")
	} else {
		expected = append(expected, "409 email-taken")
	}
	for response := range c.responses {
		Expect(response).To(BeElementOf(expected))
	}
}

// expectEach stops the clients. It expects that every acknowledged user exists,
// and that every existing user has one event in ClickHouse.
func (c *clients) expectEach(ctx context.Context, s *system.System, o outcome) {
	GinkgoHelper()
	c.stop()
	c.expectResponses()
	s.AwaitEmpty(ctx) // a user may be created after the response to its client
	var existing []string
	Expect(s.Postgres.Select(&existing, "SELECT id::text FROM users")).To(Succeed())
	exists := make(map[string]bool, len(existing))
	for _, id := range existing {
		exists[id] = true
	}
	for id, email := range c.created {
		Expect(exists).To(HaveKey(id), "the response for %s had the status 201", email)
	}
	if c.keyed {
		Expect(existing).To(HaveLen(len(c.created)), "every created user must be known to its client")
	}
	o.Events = len(existing)
	expectOnce(ctx, s, o)
	var delivered []string
	Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT groupUniqArray(JSONExtractString(event_context, 'user_id')) FROM event_log",
		&delivered)).To(Succeed())
	Expect(delivered).To(HaveLen(len(existing)))
	for _, id := range delivered {
		Expect(exists).To(HaveKey(id), "event without a user")
	}
}

// awaitMessage waits until the program has logged one of the messages.
func awaitMessage(ctx context.Context, p *programs.Process, messages ...string) {
	GinkgoHelper()
	anyOf := make([]any, len(messages))
	for i, message := range messages {
		anyOf[i] = message
	}
	Eventually(ctx, p.Messages).WithTimeout(patience).Should(ContainElement(BeElementOf(anyOf...)))
}
