package httpapi_test

import (
	"context"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// visit is what a browser does at a page.
type visit struct {
	context.Context

	mu       sync.Mutex
	hosts    map[string]bool
	problems []string
}

// browse opens a browser, without the sandbox, which it cannot have as root or in
// a container.
func browse(ctx context.Context) *visit {
	GinkgoHelper()
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.NoSandbox, chromedp.ExecPath(chromium()))
	allocator, stop := chromedp.NewExecAllocator(ctx, options...)
	DeferCleanup(stop)
	v := &visit{hosts: make(map[string]bool)}
	var closeTab context.CancelFunc
	v.Context, closeTab = chromedp.NewContext(allocator, chromedp.WithListener(v.note))
	DeferCleanup(closeTab)
	return v
}

// chromium is the browser's path.
func chromium() string {
	GinkgoHelper()
	for _, name := range []string{os.Getenv("DIEHARD_CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	Fail("Chromium is missing: install it from your package manager (Debian: apt install chromium), or name it in DIEHARD_CHROMIUM")
	return ""
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

// seen returns the hosts that were asked, and what the browser complained of.
func (v *visit) seen() (hosts, problems []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for host := range v.hosts {
		hosts = append(hosts, host)
	}
	return hosts, v.problems
}

var _ = Describe("The page of the OpenAPI document", func() {
	It("shows every operation in a browser, which asks no other host and complains of nothing", SpecTimeout(2*time.Minute), func(ctx SpecContext) {
		api, v := start(ctx), browse(ctx)
		Expect(chromedp.Do(v, chromedp.Navigate(api.url+"/docs"),
			chromedp.Click(chromedp.CSS("#operations-Users-createUser button.opblock-summary-control")),
			chromedp.WaitVisible(chromedp.CSS("#operations-Users-createUser .responses-wrapper")),
		)).To(Succeed())
		text, err := chromedp.Run(v, chromedp.Text(chromedp.CSS("#page")))
		Expect(err).NotTo(HaveOccurred())
		for _, item := range theContract().Paths.PathItems.FromOldest() {
			for _, operation := range item.GetOperations().FromOldest() {
				Expect(text).To(ContainSubstring(operation.Summary))
			}
		}
		Expect(text).To(ContainSubstring("Creates the user and its user_created event in one transaction"))
		hosts, problems := v.seen()
		Expect(hosts).To(ConsistOf(api.Addr()))
		Expect(problems).To(BeEmpty())
	})

	It("sends a request from there", SpecTimeout(2*time.Minute), func(ctx SpecContext) {
		api, v := start(ctx), browse(ctx)
		Expect(chromedp.Do(v, chromedp.Navigate(api.url+"/docs"),
			chromedp.Click(chromedp.CSS("#operations-Users-createUser button.opblock-summary-control")),
			chromedp.Click(chromedp.CSS("#operations-Users-createUser .try-out__btn")),
			chromedp.Click(chromedp.CSS("#operations-Users-createUser .execute")),
			chromedp.WaitVisible(chromedp.CSS("#operations-Users-createUser .live-responses-table")),
		)).To(Succeed())
		Expect(count(ctx, "users")).To(Equal(1))
	})

	DescribeTable("comes compressed where that is taken, and plain otherwise", func(ctx SpecContext, accepted, encoding string) {
		script := start(ctx).get(ctx, "/docs/swagger-ui-bundle.js", "Accept-Encoding: "+accepted)
		Expect(script.status).To(Equal(http.StatusOK))
		Expect(script.header.Get("Content-Encoding")).To(Equal(encoding))
		Expect(script.header.Get("Vary")).To(Equal("Accept-Encoding"))
		Expect(script.header.Get("Content-Type")).To(HavePrefix("text/javascript"))
		if encoding == "" {
			Expect(script.body).To(ContainSubstring("SwaggerUIBundle"))
		} else {
			Expect(len(script.body)).To(BeNumerically("<", 600_000))
		}
	},
		Entry("as browsers ask", "br, gzip;q=0.8", "gzip"),
		Entry("where nothing is asked for", "identity", ""),
		Entry("where it is refused", "gzip;q=0", ""),
	)

	It("forbids the browser all other hosts", func(ctx SpecContext) {
		page := start(ctx).get(ctx, "/docs")
		Expect(page.header.Get("Content-Security-Policy")).To(SatisfyAll(
			HavePrefix("default-src 'none'"), Not(ContainSubstring("http")), Not(ContainSubstring("*")), Not(ContainSubstring("unsafe"))))
	})
})
