package integration_test

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/needs"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// visit is a browser's visit to a page.
type visit struct {
	context.Context

	mu       sync.Mutex
	hosts    map[string]bool
	problems []string
}

// browse opens a page in a browser. The browser's sandbox is off, because the sandbox
// works neither for root nor in a container.
func browse(ctx context.Context, path string) *visit {
	GinkgoHelper()
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.NoSandbox, chromedp.ExecPath(path),
		chromedp.Env("TMPDIR="+GinkgoT().TempDir())) // holds the temporary files that the browser leaves
	allocator, stop := chromedp.NewExecAllocator(ctx, options...)
	DeferCleanup(stop)
	v := &visit{hosts: make(map[string]bool)}
	var closeTab context.CancelFunc
	v.Context, closeTab = chromedp.NewContext(allocator, chromedp.WithListener(v.note))
	DeferCleanup(closeTab)
	return v
}

func (v *visit) note(event any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch event := event.(type) {
	case *network.EventRequestWillBeSent:
		if address, err := url.Parse(event.Request.URL); err == nil && address.Scheme != "data" {
			v.hosts[address.Host] = true
		}
	case *runtime.EventExceptionThrown:
		v.problems = append(v.problems, event.ExceptionDetails.Text)
	case *runtime.EventConsoleAPICalled:
		if event.Type == runtime.ConsoleAPICalledTypeError {
			v.problems = append(v.problems, "console.error")
		}
	case *log.EventEntryAdded:
		v.problems = append(v.problems, event.Entry.Text)
	}
}

// seen returns the hosts that the browser contacted and the errors that it
// reported.
func (v *visit) seen() (hosts, problems []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for host := range v.hosts {
		hosts = append(hosts, host)
	}
	return hosts, v.problems
}

// summaries returns the summaries of the OpenAPI document's operations.
func summaries(ctx context.Context, api string) (all []string) {
	GinkgoHelper()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, api+"/openapi.json", http.NoBody)
	Expect(err).NotTo(HaveOccurred())
	response, err := http.DefaultClient.Do(request)
	Expect(err).NotTo(HaveOccurred())
	defer response.Body.Close()
	var document struct {
		Paths map[string]map[string]json.RawMessage `json:"paths"`
	}
	Expect(json.NewDecoder(response.Body).Decode(&document)).To(Succeed())
	for _, item := range document.Paths {
		for _, member := range item {
			var operation struct {
				Summary string `json:"summary"`
			}
			if json.Unmarshal(member, &operation) == nil && operation.Summary != "" { // the member parameters is not an operation
				all = append(all, operation.Summary)
			}
		}
	}
	return all
}

var _ = Describe("The page of the API, in a browser", func() {
	var chromium string

	BeforeEach(func(ctx SpecContext) { // without a timeout, because the browser may have to be downloaded first
		var err error
		if chromium, err = devstack.Chromium(ctx); err != nil {
			Expect(ctx.Err()).NotTo(HaveOccurred())
			needs.LeaveOut(err.Error())
		}
	})

	It("shows every operation, contacts no other host, and reports no error", NodeTimeout(2*time.Minute), func(ctx SpecContext) {
		api, v := newSystem(ctx).API(), browse(ctx, chromium)
		Expect(chromedp.Do(v, chromedp.Navigate(api.URL()+"/docs"),
			chromedp.Click(chromedp.CSS("#operations-Users-createUser button.opblock-summary-control")),
			chromedp.WaitVisible(chromedp.CSS("#operations-Users-createUser .responses-wrapper")),
		)).To(Succeed())
		text, err := chromedp.Run(v, chromedp.Text(chromedp.CSS("#page")))
		Expect(err).NotTo(HaveOccurred())
		operations := summaries(ctx, api.URL())
		Expect(operations).To(ContainElement("Create a user"))
		for _, summary := range operations {
			Expect(text).To(ContainSubstring(summary))
		}
		Expect(text).To(ContainSubstring("Creates the user and its user_created event in one transaction"))
		hosts, problems := v.seen()
		Expect("http://" + strings.Join(hosts, ", ")).To(Equal(api.URL()))
		Expect(problems).To(BeEmpty())
	})

	It("sends a request", NodeTimeout(2*time.Minute), func(ctx SpecContext) {
		s := newSystem(ctx)
		api, v := s.API(), browse(ctx, chromium)
		Expect(chromedp.Do(v, chromedp.Navigate(api.URL()+"/docs"),
			chromedp.Click(chromedp.CSS("#operations-Users-createUser button.opblock-summary-control")),
			chromedp.Click(chromedp.CSS("#operations-Users-createUser .try-out__btn")),
			chromedp.Click(chromedp.CSS("#operations-Users-createUser .execute")),
			chromedp.WaitVisible(chromedp.CSS("#operations-Users-createUser .live-responses-table")),
		)).To(Succeed())
		created, _, _ := s.Left(Default)
		Expect(created).To(Equal(1))
	})
})
