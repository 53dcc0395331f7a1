package cli

import (
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"
)

var _ = Describe("The progress of a task", func() {
	DescribeTable("shows the rate and the remaining time",
		func(done int, took time.Duration, expected string) {
			p := &Progress{verb: "retried", total: 5000, unit: "dead letters", done: done}
			Expect(p.text(took)).To(Equal(expected))
		},
		Entry("at the start", 0, 3*time.Second, "retried 0 of 5000 dead letters"),
		Entry("at the first measurement of a coarse clock", 100, time.Duration(0), "retried 100 of 5000 dead letters"),
		Entry("after a part", 1000, 2*time.Second, "retried 1000 of 5000 dead letters, 500/s, 8s left"),
		Entry("of minutes", 100, 2*time.Second, "retried 100 of 5000 dead letters, 50/s, 1m38s left"),
		Entry("within the last second", 4900, 10*time.Second, "retried 4900 of 5000 dead letters, 490/s, 1s left"),
		Entry("at the end", 5000, 10*time.Second, "retried 5000 of 5000 dead letters, 500/s, 0s left"),
	)

	It("fits into one line of the terminal", func() {
		out := gbytes.NewBuffer()
		p := &Progress{out: out, verb: "retried", total: 5000, unit: "dead letters", width: func() int { return 20 }}
		p.Add(0)
		Expect(string(out.Contents())).To(Equal(clearLine + "retried 0 of 5000 d"))
	})

	It("is not shown without a terminal", func() {
		var p *Progress
		p.Add(1)
		p.Clear()
	})
})
