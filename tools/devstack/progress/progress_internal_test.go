package progress

import (
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
)

func TestProgress(t *testing.T) {
	t.Parallel()
	RegisterFailHandler(Fail)
	RunSpecs(t, "progress")
}

var _ = Describe("A report", func() {
	It("writes one line with status and time at each tick, and nothing after stop", func() {
		out, ticks, start := gbytes.NewBuffer(), make(chan time.Time), time.Now()
		statuses := []string{"10 of 30 MB", "20 of 30 MB"}
		stop := atEach(out, func() string {
			status := statuses[0]
			statuses = statuses[1:]
			return status
		}, start, ticks)
		ticks <- start.Add(time.Minute)
		Eventually(out).Should(gbytes.Say("^10 of 30 MB, 1m0s\n$"))
		ticks <- start.Add(2*time.Minute + time.Millisecond)
		stop()
		Expect(string(out.Contents())).To(Equal("10 of 30 MB, 1m0s\n20 of 30 MB, 2m0s\n"))
		Expect(ticks).NotTo(BeSent(start))
	})

	It("writes nothing without an output", func() {
		EveryMinute(nil, func() string { panic("asked for the status") })()
	})
})
