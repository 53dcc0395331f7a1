package chaos_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/test/programs"
)

var _ = Describe("An API under the most expensive bodies", func() {
	// The formula is in docs/configuration.md: 128 MiB and eight times http.body_budget.
	const mib, budget = 1 << 20, 32*1<<20 + 128<<10
	const most = 128*mib + 8*budget
	const size = 16 * mib

	// repeat repeats the items, separated by commas, up to the size.
	repeat := func(size int, item func(i int) string) string {
		var b strings.Builder
		for i := 0; ; i++ {
			text := item(i)
			if b.Len()+1+len(text) > size {
				return b.String()
			}
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(text)
		}
	}
	same := func(text string) func(int) string { return func(int) string { return text } }
	name := func(i int) string { return strconv.FormatInt(int64(i), 36) }

	DescribeTable("needs no more memory than the formula says, for", func(ctx SpecContext, path string, body func() string) {
		s := newSystem(ctx)
		api := s.API()
		sent := body()
		statuses := map[int]int{}
		var mu sync.Mutex
		var clients sync.WaitGroup
		for range 16 {
			clients.Go(func() {
				defer GinkgoRecover()
				for status, tries := http.StatusServiceUnavailable, 0; status == http.StatusServiceUnavailable && tries < 20; tries++ {
					status = sendBody(ctx, api.URL()+path, sent)
					mu.Lock()
					statuses[status]++
					mu.Unlock()
				}
			})
		}
		clients.Wait()
		peak, seconds := peakMemory(api), cpuSeconds(api)
		AddReportEntry("cost", fmt.Sprintf("%s: peak memory %d MiB of %d MiB, %.1f s of CPU for the responses %v", CurrentSpecReport().LeafNodeText, peak/mib, most/mib, seconds, statuses))
		Expect(peak).To(BeNumerically("<=", most))
		Expect(len(statuses)).To(BeNumerically(">", 1), "some of the bodies arrive")
		for status := range statuses {
			Expect(status).To(Or(BeNumerically("<", http.StatusInternalServerError), Equal(http.StatusServiceUnavailable)))
		}
		code, err := api.Ready()
		Expect(err).NotTo(HaveOccurred())
		Expect(code).To(Equal(http.StatusOK))
	},
		Entry("a user with millions of unknown fields", "/v1/users", func() string {
			return `{"email":"z@example.com",` + repeat(size-100, func(i int) string { return `"` + name(i) + `":1` }) + `}`
		}),
		Entry("a batch of millions of numbers", "/v1/users/batch", func() string {
			return `{"data":[` + repeat(size-100, same("1")) + `]}`
		}),
		Entry("a batch of invalid users with many fields", "/v1/users/batch", func() string {
			fields := repeat(16_000, func(i int) string { return `"` + name(i) + strings.Repeat("n", 250) + `":1` })
			return `{"data":[` + repeat(size-100, same(`{`+fields+`}`)) + `]}`
		}),
		Entry("an event of many names", "/v1/events", func() string {
			return `{"event_type":"a","event_context":{` + repeat(size-100, func(i int) string { return `"` + name(i) + strings.Repeat("n", 160) + `":1` }) + `}}`
		}),
		Entry("an event of empty arrays", "/v1/events", func() string {
			return `{"event_type":"a","event_context":[` + repeat(size-100, same("[]")) + `]}`
		}),
		Entry("an event of quotes", "/v1/events", func() string {
			return `{"event_type":"a","event_context":"` + strings.Repeat(`\"`, size/2-100) + `"}`
		}),
		Entry("a batch of events of quotes", "/v1/events/batch", func() string {
			event := `{"event_type":"a","event_context":"` + strings.Repeat(`\"`, 8000) + `"}`
			return `{"data":[` + repeat(size-100, same(event)) + `]}`
		}),
	)
})

// sendBody sends the body, and returns the status of the response. A server that refuses a
// body may close the connection before the client has sent it; the status is then 0.
func sendBody(ctx context.Context, url, body string) int {
	GinkgoHelper()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	Expect(err).NotTo(HaveOccurred())
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, response.Body) // the status is what counts
	return response.StatusCode
}

// cpuSeconds returns the CPU time of the program.
func cpuSeconds(p *programs.Process) float64 {
	GinkgoHelper()
	const ticks = 100 // per second, on every Linux
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Command.Process.Pid))
	Expect(err).NotTo(HaveOccurred())
	_, rest, found := strings.Cut(string(stat), ") ")
	Expect(found).To(BeTrue())
	fields := strings.Fields(rest)
	user, err := strconv.ParseFloat(fields[11], 64)
	Expect(err).NotTo(HaveOccurred())
	system, err := strconv.ParseFloat(fields[12], 64)
	Expect(err).NotTo(HaveOccurred())
	return (user + system) / ticks
}
