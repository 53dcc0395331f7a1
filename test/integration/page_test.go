package integration_test

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/needs"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/system"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// imagesEnv names the folder for screenshots, and loadEnv the duration of the load before
// them. See the target docs/images of the Makefile.
const (
	imagesEnv = "DIEHARD_PAGE_IMAGES"
	loadEnv   = "DIEHARD_PAGE_LOAD"
)

// look is a way to look at a page.
type look struct {
	scheme string // light or dark
	width  int64
}

var (
	desktop = look{"light", 1200}
	dark    = look{"dark", 1200}
	phone   = look{"light", 390}
)

// as makes the browser show pages in this way.
func (v *visit) as(l look) {
	GinkgoHelper()
	Expect(chromedp.Do(v, chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: l.scheme}},
		})
		return err
	}), chromedp.EmulateViewport(l.width, 800))).To(Succeed())
}

// do does each action, and repeats one that does not find its element: the browser replaces
// the elements of a page while it loads.
func (v *visit) do(actions ...chromedp.Action[chromedp.Void]) {
	GinkgoHelper()
	for _, action := range actions {
		Eventually(func() error { return chromedp.Do(v, action) }).WithTimeout(patience).Should(Succeed())
	}
}

// text returns the text of an element, in one step, because the page replaces its elements.
func (v *visit) text(selector string) (string, error) {
	return chromedp.Run(v, chromedp.Evaluate[string](fmt.Sprintf("document.querySelector(%q)?.innerText ?? ''", selector)))
}

// violations returns the violations of rules for accessible pages, as axe-core finds them
// on the page that the browser shows.
func (v *visit) violations(axe string) (found []string) {
	GinkgoHelper()
	_, err := chromedp.Run(v, chromedp.Evaluate[*runtime.RemoteObject](axe))
	Expect(err).NotTo(HaveOccurred())
	found, err = chromedp.Run(v, chromedp.Evaluate[[]string](`axe.run().then(result =>
		result.violations.map(violation => violation.id + ": " + violation.nodes.map(node => node.html + " " + node.failureSummary).join(" | ")))`,
		func(p *runtime.EvaluateParams) { p.AwaitPromise = new(true) }))
	Expect(err).NotTo(HaveOccurred())
	return found
}

// overflows returns whether the page is wider than the window.
func (v *visit) overflows() (bool, error) {
	return chromedp.Run(v, chromedp.Evaluate[bool](`document.documentElement.scrollWidth > innerWidth`))
}

// photograph writes a screenshot of the page if a folder for screenshots is given.
func (v *visit) photograph(name string) {
	GinkgoHelper()
	dir := os.Getenv(imagesEnv)
	if dir == "" {
		return
	}
	image, err := chromedp.Run(v, chromedp.FullScreenshot(100))
	Expect(err).NotTo(HaveOccurred())
	Expect(os.WriteFile(filepath.Join(dir, name), image, 0o644)).To(Succeed()) //nolint:gosec // not a secret
}

var _ = Describe("The page of the relay, in a browser", func() {
	var (
		chromium, axe string
		s             *system.System
	)

	BeforeEach(func(ctx SpecContext) { // without a timeout, because the browser may have to be downloaded first
		var err error
		if chromium, err = devstack.Chromium(ctx); err != nil {
			Expect(ctx.Err()).NotTo(HaveOccurred())
			needs.LeaveOut(err.Error())
		}
		path, err := devstack.Axe(ctx)
		Expect(err).NotTo(HaveOccurred())
		script, err := os.ReadFile(path)
		Expect(err).NotTo(HaveOccurred())
		axe = string(script)
		s = newSystem(ctx)
	})

	verdict := func(v *visit) func() (string, error) {
		return func() (string, error) { return v.text("#verdict h2") }
	}
	awaitVerdict := func(v *visit, pattern string) {
		GinkgoHelper()
		Eventually(verdict(v)).WithTimeout(patience).Should(MatchRegexp(pattern))
	}
	// refuse makes ClickHouse refuse events of a type.
	refuse := func(ctx context.Context, eventType string) {
		GinkgoHelper()
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log ADD CONSTRAINT no_"+eventType+" CHECK event_type != '"+eventType+"'")
	}
	deadLetters := func(g Gomega) int {
		_, _, dead := s.Left(g)
		return dead
	}

	It("is accessible, in light and dark and on a phone, contacts no other host, and reports no error", NodeTimeout(4*time.Minute), func(ctx SpecContext) {
		const token = "0123456789abcdef"
		refuse(ctx, "refund_requested")
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log ADD CONSTRAINT failing CHECK throwIf(event_type = 'parcel_lost') = 0")
		relay := s.Relay(s.ClickHouse.Native, "DIEHARD_ADMIN_TOKEN="+token, "DIEHARD_RELAY_BACKOFF_MIN=1m", "DIEHARD_RELAY_BACKOFF_MAX=1h", "DIEHARD_RELAY_LINGER=1ms")
		s.Relay(s.ClickHouse.Native, "DIEHARD_RELAY_LINGER=1s")
		Expect(s.Publish(ctx, append(system.Events(20), system.Event(outbox.WithType("refund_requested")))...)).To(Succeed())
		Eventually(deadLetters).WithTimeout(patience).Should(Equal(1))
		Expect(s.Publish(ctx, system.Event(outbox.WithType("parcel_lost")))).To(Succeed())
		var batch string
		Eventually(func() error {
			return s.Postgres.GetContext(ctx, &batch, "SELECT batch_id FROM outbox_batches WHERE failures > 0")
		}).WithTimeout(patience).Should(Succeed())

		v := browse(ctx, chromium)
		check := func(name string) {
			GinkgoHelper()
			for _, l := range []look{desktop, dark, phone} {
				v.as(l)
				Expect(v.violations(axe)).To(BeEmpty(), "%s, %+v", name, l)
				Expect(v.overflows()).To(BeFalse(), "%s, %+v", name, l)
			}
		}
		v.as(desktop)
		url := relay.AdminURL()
		v.do(chromedp.Navigate(url))
		check("login")
		v.do(chromedp.SendKeys(chromedp.CSS("[name=name]"), "Ada"), chromedp.SendKeys(chromedp.CSS("[name=token]"), "wrong token 1234"+kb.Enter),
			chromedp.WaitVisible(chromedp.CSS("[role=alert]")))
		check("login refused")
		v.do(chromedp.SendKeys(chromedp.CSS("[name=token]"), token+kb.Enter), chromedp.WaitVisible(chromedp.CSS("#verdict")))
		awaitVerdict(v, `^Delivering`)
		Eventually(v.text).WithArguments("#fleet").WithTimeout(patience).Should(ContainSubstring("Settings that differ: relay.linger is 1ms (1 relay), 1s (1 relay)."))
		check("overview")
		for _, path := range []string{
			"/batches", "/batches?state=put_off", "/batches/" + batch, "/dead-letters", "/dead-letters?since=never", "/dead-letters/1", "/pause", "/batches/7",
		} {
			v.do(chromedp.Navigate(url + path))
			check(path)
		}
		v.do(chromedp.Navigate(url+"/dead-letters/1"), chromedp.Click(chromedp.CSS("button[value=discard]")), chromedp.WaitVisible(chromedp.CSS("[name=count]")))
		check("confirmation")
		v.do(chromedp.SendKeys(chromedp.CSS("[name=count]"), "1"+kb.Enter), chromedp.WaitVisible(chromedp.CSS("[role=log]")))
		check("progress")
		Eventually(deadLetters).WithTimeout(patience).Should(BeZero())

		hosts, problems := v.seen()
		Expect("http://" + strings.Join(hosts, ", ")).To(Equal(url))
		Expect(problems).To(HaveEach(MatchRegexp(`status of 4(04|22)`)), "the pages with an error")
	})

	It("says what is wrong while it is open, and when it is over", NodeTimeout(3*time.Minute), func(ctx SpecContext) {
		proxy, through := faults.StartProxyTo(s.ClickHouse.Native)
		toPostgres, postgresDSN := faults.StartProxyTo(s.PostgresDSN)
		relay := s.Relay(through, "DIEHARD_POSTGRES_DSN="+postgresDSN)
		v := browse(ctx, chromium)
		v.as(desktop)
		v.do(chromedp.Navigate(relay.AdminURL()))
		awaitVerdict(v, `^Delivering: no event waits\.$`)

		By("losing ClickHouse")
		proxy.Down()
		Expect(s.Publish(ctx, system.Events(12)...)).To(Succeed())
		awaitVerdict(v, `^Not delivering since \d\d:\d\d:\d\d UTC: sink: .*connection refused; 12 events wait, the oldest for .*\. Nothing is lost\.$`)
		Expect(v.text("#fleet")).To(ContainSubstring("open since"))
		Expect(v.text("#announcement")).To(HavePrefix("Not delivering since "), "a screen reader hears it")
		Expect(v.text("#verdict a")).To(Equal("Runbook: DiehardNotDelivering"))
		proxy.Up()
		awaitVerdict(v, `^Delivering: no event waits\.$`)

		By("having too many parts")
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log MODIFY SETTING parts_to_throw_insert = 1")
		Expect(s.Publish(ctx, system.Events(1)...)).To(Succeed())
		awaitVerdict(v, `^Not delivering since .*TOO_MANY_PARTS.*; 1 event waits for .*\. Nothing is lost\.$`)
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log RESET SETTING parts_to_throw_insert")
		awaitVerdict(v, `^Delivering: no event waits\.$`)

		By("losing the table")
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "RENAME TABLE event_log TO elsewhere")
		Expect(s.Publish(ctx, system.Events(1)...)).To(Succeed())
		awaitVerdict(v, `^Not delivering since .*: 1 event waits|^Not delivering since .*; 1 event waits`)
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "RENAME TABLE elsewhere TO event_log")
		awaitVerdict(v, `^Delivering: no event waits\.$`)

		By("losing PostgreSQL")
		toPostgres.Down()
		awaitVerdict(v, `^PostgreSQL is not available: .*\. Committed events wait there\. Nothing is lost\.$`)
		Expect(v.text("#verdict a")).To(Equal("Runbook: DiehardPostgreSQLFailing"))
		toPostgres.Up()
		awaitVerdict(v, `^Delivering: no event waits\.$`)

		By("refusing an event")
		refuse(ctx, "refund_requested")
		Expect(s.Publish(ctx, system.Event(outbox.WithType("refund_requested")))).To(Succeed())
		Eventually(v.text).WithArguments("#verdict").WithTimeout(patience).Should(ContainSubstring("1 dead letter waits for your decision"))
		rows, distinct := s.Arrived(ctx, Default)
		Expect([]int{rows, distinct}).To(Equal([]int{14, 14}))
	})

	It("draws the last hour", NodeTimeout(2*time.Hour), func(ctx SpecContext) {
		refuse(ctx, "refund_requested")
		proxy, through := faults.StartProxyTo(s.ClickHouse.Native)
		relay := s.Relay(through, "DIEHARD_RELAY_BACKOFF_MAX=20s")
		s.Relay(through)
		v := browse(ctx, chromium)
		v.as(desktop)
		v.do(chromedp.Navigate(relay.AdminURL()))
		types := []string{"order_placed", "order_paid", "parcel_sent"}
		// publish publishes some events after each update of the page.
		shown := ""
		publish := func() {
			GinkgoHelper()
			Eventually(v.text).WithArguments("#liveness").WithTimeout(patience).ShouldNot(Equal(shown))
			var err error
			shown, err = v.text("#liveness")
			Expect(err).NotTo(HaveOccurred())
			var events []outbox.Event
			for range 10 + rand.IntN(40) { //nolint:gosec // not a secret
				events = append(events, system.Event(outbox.WithType(types[rand.IntN(len(types))]))) //nolint:gosec // not a secret
			}
			if rand.IntN(50) == 0 { //nolint:gosec // not a secret
				events = append(events, system.Event(outbox.WithType("refund_requested")))
			}
			Expect(s.Publish(ctx, events...)).To(Succeed())
		}
		load, err := time.ParseDuration(cmp.Or(os.Getenv(loadEnv), "0s"))
		Expect(err).NotTo(HaveOccurred())
		rates := func() (string, error) { return v.text("#charts figure:nth-of-type(3) strong") }
		for began := time.Now(); ; {
			publish()
			rate, err := rates()
			Expect(err).NotTo(HaveOccurred())
			if strings.HasSuffix(rate, "/s") && rate != "0/s" && time.Since(began) > load {
				break
			}
		}
		Expect(v.text("#charts figure:nth-of-type(4)")).To(MatchRegexp(`p50 \d+ m?s\s+p95 \d+ m?s\s+p99 \d+ m?s`))
		Expect(chromedp.Run(v, chromedp.Evaluate[string](`document.querySelector("#charts figure:nth-of-type(3) path.line").getAttribute("d")`))).
			To(HavePrefix("M"), "a line")
		v.photograph("page.png")
		v.as(dark)
		v.photograph("page-dark.png")
		v.as(desktop)

		proxy.Down()
		awaitVerdict(v, `^Not delivering since `)
		for began := time.Now(); time.Since(began) < load/10; {
			publish()
		}
		awaitVerdict(v, `events wait, the oldest for`)
		v.photograph("page-outage.png")
		v.as(phone)
		v.photograph("page-phone.png")
		v.as(desktop)
		v.do(chromedp.Navigate(relay.AdminURL() + "/dead-letters"))
		v.photograph("page-dead-letters.png")
	})

	It("says that it is not live after the relay has stopped", NodeTimeout(2*time.Minute), func(ctx SpecContext) {
		relay, v := s.Relay(s.ClickHouse.Native), browse(ctx, chromium)
		v.as(phone)
		v.do(chromedp.Navigate(relay.AdminURL()))
		Eventually(v.text).WithArguments("#liveness").WithTimeout(patience).Should(HavePrefix("Live. Last update "))
		relay.Stop()
		Eventually(v.text).WithArguments("#liveness").WithTimeout(patience).Should(HavePrefix("Not live: this relay does not respond."))
	})

	It("pauses and resumes the fleet with the keyboard only", NodeTimeout(2*time.Minute), func(ctx SpecContext) {
		relay, v := s.Relay(s.ClickHouse.Native), browse(ctx, chromium)
		v.as(desktop)
		// reach presses Tab until an element with this text has the focus, and then Enter.
		reach := func(label string) {
			GinkgoHelper()
			Eventually(func() (string, error) {
				if err := chromedp.Do(v, chromedp.KeyEvent(kb.Tab)); err != nil {
					return "", err
				}
				return chromedp.Run(v, chromedp.Evaluate[string]("document.activeElement.textContent"))
			}).WithTimeout(patience).Should(Equal(label))
			v.do(chromedp.KeyEvent(kb.Enter))
		}
		v.do(chromedp.Navigate(relay.AdminURL()))
		awaitVerdict(v, `^Delivering`)
		reach("Pause")
		v.do(chromedp.WaitVisible(chromedp.CSS("button.danger")))
		reach("Pause the fleet")
		awaitVerdict(v, `^Paused since .* by operator@127\.0\.0\.1: no event waits\. Nothing is lost\.$`)
		Expect(s.Publish(ctx, system.Events(3)...)).To(Succeed())
		awaitVerdict(v, `^Paused since .*: 3 events wait`)
		reach("Resume the delivery")
		awaitVerdict(v, `^Delivering: no event waits\.$`)
		s.ExpectDelivered(ctx, 3)
		Eventually(relay.Err).Should(gbytes.Say(`"operator acted".*"pause"`))
	})

	It("retries all dead letters of a search", NodeTimeout(3*time.Minute), func(ctx SpecContext) {
		insertDeadLetters(ctx, s.PostgresDSN, 230)
		relay, v := s.Relay(s.ClickHouse.Native), browse(ctx, chromium)
		v.as(desktop)
		v.do(chromedp.Navigate(relay.AdminURL()+"/dead-letters"), chromedp.SendKeys(chromedp.CSS("[name=since]"), "1h"+kb.Enter),
			chromedp.WaitVisible(chromedp.CSS("label [name=since][value='1h']")), chromedp.Click(chromedp.CSS("input.all")))
		selected, err := chromedp.Run(v, chromedp.Evaluate[int](`document.querySelectorAll('[name="id"]:checked').length`))
		Expect(err).NotTo(HaveOccurred())
		Expect(selected).To(Equal(50), "of this page")
		v.do(chromedp.Click(chromedp.CSS("[value=all]")), chromedp.Click(chromedp.CSS("button[value=retry]")),
			chromedp.WaitVisible(chromedp.CSS("form.stack button")))
		Expect(v.text("h1")).To(Equal("Retry 230 dead letters?"))
		v.do(chromedp.Click(chromedp.CSS("form.stack button")))
		Eventually(v.text).WithArguments("main").WithTimeout(patience).Should(ContainSubstring("230 dead letters retried."))
		s.ExpectDelivered(ctx, 230)
	})
})
