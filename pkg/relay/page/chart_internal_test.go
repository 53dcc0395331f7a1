package page

import (
	"math"
	"slices"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/relay"
)

func TestPage(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyTimeout(time.Minute)
	RunSpecs(t, "page")
}

var _ = Describe("The history", func() {
	at := time.Date(2026, 11, 24, 3, 0, 0, 0, time.UTC)
	progress := func(events ...uint64) relay.Progress {
		p := relay.Progress{}
		for i, upTo := range []float64{1, 2, math.Inf(1)} {
			p.Latency = append(p.Latency, relay.LatencyBucket{UpTo: upTo, Events: events[i]})
			p.Events += events[i]
		}
		return p
	}

	It("has the rate and the latency of the events since the sample before", func() {
		var h history
		h.add(at, 5, 50, 2, progress(100, 0, 0))
		h.add(at.Add(20*time.Second), 7, 70, 3, progress(100, 40, 0))
		h.add(at.Add(40*time.Second), 7, 70, 3, progress(100, 40, 0))
		samples := h.hour()
		Expect(samples).To(HaveLen(3))
		Expect(math.IsNaN(samples[0].rate)).To(BeTrue(), "before, nothing is known")
		Expect(samples[1]).To(Equal(sample{at: at.Add(20 * time.Second), backlog: 7, bytes: 70, age: 3, rate: 2, p50: 1.5, p95: 1.95, p99: 1.99}))
		Expect(samples[2].rate).To(BeZero())
		Expect(math.IsNaN(samples[2].p50)).To(BeTrue(), "no event has a latency")
	})

	DescribeTable("describes the growth of the backlog", func(want string, waiting, limit int64, megabytes []float64) {
		var samples []sample
		for i, value := range megabytes {
			samples = append(samples, sample{at: at.Add(time.Duration(i) * time.Minute), bytes: value * 1e6})
		}
		Expect(describeGrowth(samples, waiting, limit)).To(Equal(want))
	},
		Entry("without samples", "", int64(0), int64(0), nil),
		Entry("of too short a time", "", int64(0), int64(0), []float64{1.0, 2.0}),
		Entry("without a bound", "60.0 MB more per hour", int64(3e6), int64(0), []float64{1.0, 2.0, 3.0}),
		Entry("towards a bound", "60.0 MB more per hour: the bound of 93.0 MB is reached in 1 h 30 min", int64(3e6), int64(93e6), []float64{1.0, 2.0, 3.0}),
		Entry("over the last minutes only", "", int64(9e6), int64(0), append([]float64{0, 0}, slices.Repeat([]float64{9}, 20)...)),
		Entry("after a time without figures", "90.0 MB more per hour", int64(4e6), int64(0), []float64{1.0, math.NaN(), 4.0}),
		Entry("of a backlog that only varies", "", int64(4e6), int64(0), []float64{4.0, 4.01, 4.03}),
		Entry("of a backlog that drains", "", int64(1e6), int64(9e6), []float64{3.0, 2.0, 1.0}),
		Entry("at the bound", "the bound of 9.0 MB is reached: the API refuses events", int64(9e6), int64(9e6), []float64{3.0, 2.0, 1.0}),
	)

	It("keeps one hour", func() {
		var h history
		for i := range keptSamples + 5 {
			h.add(at.Add(time.Duration(i)*sampleInterval), float64(i), 0, 0, progress(0, 0, 0))
		}
		samples := h.hour()
		Expect(samples).To(HaveLen(keptSamples))
		Expect(samples[0].backlog).To(Equal(5.0))
	})

	DescribeTable("estimates quantiles as Prometheus does", func(q float64, want float64, events ...uint64) {
		Expect(quantile(progress(events...).Latency, q)).To(BeNumerically("~", want, 1e-9))
	},
		Entry("in the first bucket", 0.5, 0.5, uint64(10), uint64(0), uint64(0)),
		Entry("between the buckets", 0.5, 1.0, uint64(5), uint64(5), uint64(0)),
		Entry("in the second bucket", 0.75, 1.5, uint64(5), uint64(5), uint64(0)),
		Entry("behind an empty bucket", 0.5, 1.5, uint64(0), uint64(10), uint64(0)),
		Entry("above all bounds", 0.99, 2.0, uint64(0), uint64(0), uint64(3)),
	)
})

var _ = Describe("A chart", func() {
	now := time.Date(2026, 11, 24, 4, 0, 0, 0, time.UTC)
	drawn := func(values ...float64) chart {
		var samples []sample
		for i, value := range values {
			at := now.Add(-time.Duration(len(values)-1-i) * 20 * time.Minute)
			samples = append(samples, sample{at: at, backlog: value, age: value, rate: value, p50: value, p95: value, p99: value})
		}
		return newCharts(samples, now)[0]
	}

	It("draws a line from the samples' times and values", func() {
		samples := []sample{{at: now.Add(-40 * time.Second), backlog: 0}, {at: now.Add(-20 * time.Second), backlog: 10}, {at: now, backlog: 5}}
		backlog := newCharts(samples, now)[0]
		Expect(backlog.Lines[0].Path).To(BeEquivalentTo(`d="M356.0 96.0h0.1L358.0 6.0L360.0 51.0"`))
		Expect(backlog.Lines[0].Area).To(BeEquivalentTo(`d="M356.0 96.0L358.0 6.0L360.0 51.0L360.0 96.0L356.0 96.0Z"`))
		Expect(backlog.Ticks).To(Equal([]tick{{6, "10"}, {51, "5"}}))
		Expect(backlog.Now).To(Equal("5"))
		Expect(backlog.Summary).To(Equal("Last: 5. Highest in the last hour: 10 at 2026-11-24 03:59:40 UTC."))
	})

	It("has a gap where a figure is unknown or a sample is missing", func() {
		Expect(string(drawn(1, 2).Lines[0].Path)).To(Equal(`d="M240.0 51.0h0.1M360.0 6.0h0.1"`), "20 minutes without a sample")
		samples := []sample{{at: now.Add(-40 * time.Second), backlog: 2}, {at: now.Add(-20 * time.Second), backlog: math.NaN()}, {at: now, backlog: 2}}
		Expect(string(newCharts(samples, now)[0].Lines[0].Path)).To(Equal(`d="M356.0 6.0h0.1M360.0 6.0h0.1"`))
	})

	It("omits samples that are older than an hour", func() {
		Expect(string(drawn(8, 8, 8, 8, 1).Lines[0].Path)).To(HavePrefix(`d="M0.0 `))
	})

	It("says that there is no figure", func() {
		empty := newCharts(nil, now)[3]
		Expect(empty.Empty).To(BeTrue())
		Expect(empty.Summary).To(Equal("No figure in the last hour."))
	})

	DescribeTable("has an axis that people can read", func(i int, most float64, ticks ...string) {
		var texts []string
		for _, t := range newCharts([]sample{{at: now, backlog: most, age: most, rate: most, p50: most, p95: most, p99: most}}, now)[i].Ticks {
			texts = append(texts, t.Text)
		}
		Expect(texts).To(Equal(ticks))
	},
		Entry("of nothing", 0, 0.0, "2", "1"),
		Entry("of events", 0, 4_031.0, "10,000", "5,000"),
		Entry("of millions", 0, 1.3e6, "2.0 million", "1.0 million"),
		Entry("of ages", 1, 95.0, "2 min", "1 min"),
		Entry("of an old event", 1, 5_400.0, "2 h", "1 h"),
		Entry("of a rate", 2, 0.4, "2.0/s", "1.0/s"),
		Entry("of latencies", 3, 0.08, "100 ms"),
		Entry("of long latencies", 3, 70.0, "1 min 40 s", "10 s", "1 s", "100 ms"),
	)
})

var _ = Describe("A session", func() {
	a := access{token: "0123456789abcdef"}
	now := time.Date(2026, 11, 24, 3, 0, 0, 0, time.UTC)

	It("ends after 12 hours", func() {
		session := a.session("Ada Lovelace. é", now)
		Expect(a.verify(session, now.Add(12*time.Hour-time.Second))).To(Equal("Ada Lovelace. é"))
		_, err := a.verify(session, now.Add(12*time.Hour))
		Expect(err).To(HaveOccurred())
	})

	It("is valid for its token, name and end only", func() {
		session := a.session("ada", now)
		_, err := access{token: "0123456789abcdeX"}.verify(session, now)
		Expect(err).To(HaveOccurred())
		for _, forged := range []string{"", ".", "..", "x" + session, session + "x", a.session("bob", now)[:10] + session[10:]} {
			_, err := a.verify(forged, now)
			Expect(err).To(HaveOccurred(), forged)
		}
	})
})

var _ = DescribeTable("A loopback address", func(addr string, want bool) { Expect(isLoopback(addr)).To(Equal(want)) },
	Entry(nil, "127.0.0.1:9091", true), Entry(nil, "[::1]:9091", true), Entry(nil, "localhost:1", true), Entry(nil, "LocalHost", true),
	Entry(nil, "127.0.0.1", true), Entry(nil, "[::1]", true), Entry(nil, ":9091", false), Entry(nil, "0.0.0.0:9091", false),
	Entry(nil, "10.0.0.1:9091", false), Entry(nil, "localhost.evil.example", false), Entry(nil, "127.0.0.1.evil.example:9091", false), Entry(nil, "", false),
)
