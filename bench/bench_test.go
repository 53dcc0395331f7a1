package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

func TestBench(t *testing.T) {
	t.Parallel()
	RegisterFailHandler(Fail)
	RunSpecs(t, "bench")
}

var _ = Describe("Figures", func() {
	DescribeTable("interpolate a percentile between its neighbours",
		func(values []float64, share, expected float64) {
			Expect(percentile(values, share)).To(BeNumerically("~", expected, 1e-9))
		},
		Entry("a single value", []float64{7}, 0.99, 7.0),
		Entry("the median of three, in any order", []float64{9, 1, 5}, 0.5, 5.0),
		Entry("the median of four", []float64{4, 1, 3, 2}, 0.5, 2.5),
		Entry("the lowest", []float64{4, 1, 3, 2}, 0.0, 1.0),
		Entry("the highest", []float64{4, 1, 3, 2}, 1.0, 4.0),
	)

	It("return NaN for an empty series", func() {
		Expect(math.IsNaN(median(nil))).To(BeTrue())
	})

	It("compare the first tenth of the values with the last tenth", func() {
		var values []float64
		for i := range 40 {
			values = append(values, float64(i))
		}
		first, last := tenths(values)
		Expect(first).To(Equal(1.5))
		Expect(last).To(Equal(37.5))
	})

	It("compare the values of the same round, however much the rounds differ", func() {
		fast, slow := &series{Values: []float64{10, 1000, 30}}, &series{Values: []float64{5, 500, 15}}
		Expect(ratios(fast, slow)).To(Equal(2.0))
	})

	DescribeTable("have three significant digits", func(value float64, text string) {
		Expect(significant(value)).To(Equal(text))
	},
		Entry(nil, 0.12345, "0.123"), Entry(nil, 1.0, "1"), Entry(nil, 99.96, "100"), Entry(nil, 123.5, "124"), Entry(nil, 1234567.0, "1234567"),
	)

	It("exclude the CPU time of the clients", func() {
		Expect(withoutClients(100, time.Second, 0)).To(Equal(100.0))
		Expect(withoutClients(100, time.Second, time.Second/2)).To(BeNumerically(">", 100))
	})
})

var _ = Describe("The page", func() {
	relay := series{Name: "one relay", Unit: "events/s", Values: []float64{100_000, 300_000, 200_000}}
	pipe := series{Name: "the bare pipe", Unit: "events/s", Values: []float64{1000, 1000, 1000}}
	alive := series{Name: "ClickHouse <alive>", Unit: "us", Values: []float64{1.5}}
	step := series{Name: "  a step", Unit: "s", Values: []float64{1}}
	measured := results{
		Figures: []figure{
			{Name: "relay_vs_pipe", Value: 1.25, Of: "one relay", Against: "the bare pipe"},
			{Name: "relay_peak_rss_mb", Value: 77},
			{Name: "api_p99_outage_ratio", Value: 0.5, Of: "ClickHouse <alive>", Against: "ClickHouse <alive>"},
		},
		Measured: []summary{relay.summary(), pipe.summary(), step.summary(), alive.summary()},
	}
	var path string
	BeforeEach(func() {
		path = filepath.Join(GinkgoT().TempDir(), "page.md")
		Expect(os.WriteFile(path, []byte("before\n"+runBegins+"old\n"+runEnds+"after\n"), 0o600)).To(Succeed())
	})
	read := func(path string) string {
		GinkgoHelper()
		content, err := os.ReadFile(path)
		Expect(err).NotTo(HaveOccurred())
		return string(content)
	}

	It("gets the tables and a chart between its marks, repeatedly", func() {
		for range 2 {
			Expect(writePage(path, measured)).To(Succeed())
		}
		Expect(read(path)).To(And(HavePrefix("before\n"+runBegins), HaveSuffix(runEnds+"after\n"), Not(ContainSubstring("old")),
			ContainSubstring("| `relay_vs_pipe` | 1.25 |"), ContainSubstring("| one relay | 200000 | 100000 | 300000 | events/s |"),
			ContainSubstring("| a step | 1 |"), ContainSubstring("](page.svg)")))
	})

	It("is redrawn from the JSON file beside it", func() {
		Expect(writePage(path, measured)).To(Succeed())
		page, chart := read(path), read(beside(path, ".svg"))
		Expect(os.WriteFile(path, []byte("before\n"+runBegins+runEnds+"after\n"), 0o600)).To(Succeed())
		Expect(os.Remove(beside(path, ".svg"))).To(Succeed())
		Expect(run(context.Background(), options{redraw: path})).To(Succeed())
		Expect(read(path)).To(Equal(page))
		Expect(read(beside(path, ".svg"))).To(Equal(chart))
	})

	It("is unchanged if the marks are missing", func() {
		Expect(os.WriteFile(path, []byte("before\n"), 0o600)).To(Succeed())
		Expect(writePage(path, measured)).To(MatchError(ContainSubstring("lacks one of the marks")))
		Expect(read(path)).To(Equal("before\n"))
	})

	It("in this repository agrees with its JSON file", func() {
		const committed = "../docs/benchmarks.md"
		for _, extension := range []string{".md", ".json"} {
			Expect(os.WriteFile(beside(path, extension), []byte(read(beside(committed, extension))), 0o600)).To(Succeed())
		}
		Expect(drawPage(path)).To(Succeed())
		Expect(strings.ReplaceAll(read(path), "page.svg", "benchmarks.svg")).To(Equal(read(committed)), "make bench/chart")
		Expect(read(beside(path, ".svg"))).To(Equal(read(beside(committed, ".svg"))), "make bench/chart")
	})

	Describe("has a chart", func() {
		var elements map[string]int // by name and class
		var texts []string
		BeforeEach(func() {
			elements, texts = make(map[string]int), nil
			chart := xml.NewDecoder(bytes.NewReader(drawChart(measured)))
			for {
				token, err := chart.Token()
				if errors.Is(err, io.EOF) {
					break
				}
				Expect(err).NotTo(HaveOccurred())
				switch token := token.(type) {
				case xml.StartElement:
					for _, attribute := range token.Attr {
						if attribute.Name.Local == "class" {
							elements[token.Name.Local+"."+attribute.Value]++
						}
					}
				case xml.CharData:
					texts = append(texts, string(token))
				}
			}
		})

		It("with a bar and a range for each side of each ratio, and a bar of each colour in the legend", func() {
			Expect(elements).To(And(HaveKeyWithValue("rect.diehard", 1+2), HaveKeyWithValue("rect.reference", 1+2),
				HaveKeyWithValue("path.whisker", 4), HaveKeyWithValue("text.ratio", 2), HaveKeyWithValue("text.heading", 2)))
		})

		It("with names, values and ratios", func() {
			Expect(texts).To(ContainElements("one relay", "the bare pipe", "200,000 events/s", "1,000 events/s", "1.25×",
				"longer is better", "ClickHouse <alive>", "1.5 µs", "0.5×", "shorter is better"))
			Expect(texts).NotTo(ContainElement("a step"))
		})

		It("that shows every ratio except excluded ratios", func() {
			var shown []string
			for _, g := range groups {
				shown = append(shown, g.figures...)
			}
			content, err := os.ReadFile("../docs/benchmarks.json")
			Expect(err).NotTo(HaveOccurred())
			var committed results
			Expect(json.Unmarshal(content, &committed)).To(Succeed())
			for _, f := range committed.Figures {
				if f.Against != "" && f.Name != "batch_rows_8_vs_1" { // equal batches are neither better nor worse
					Expect(shown).To(ContainElement(f.Name))
				}
			}
		})
	})
})

var _ = Describe("The command line", func() {
	It("reports the current part and its progress every minute", func() {
		b := newBench(options{rounds: 2}, io.Discard)
		Expect(*b.stage.Load()).To(Equal("starting"))
		b.part = "relay (part 5 of 12): "
		var stages []string
		look := func(context.Context) error {
			stages = append(stages, *b.stage.Load())
			return nil
		}
		Expect(b.inRounds(context.Background(), slices.Repeat([]func(context.Context) error{look}, 2)...)).To(Succeed())
		Expect(stages).To(Equal([]string{
			"relay (part 5 of 12): round 1 of 2, case 1 of 2", "relay (part 5 of 12): round 1 of 2, case 2 of 2",
			"relay (part 5 of 12): round 2 of 2, case 1 of 2", "relay (part 5 of 12): round 2 of 2, case 2 of 2",
		}))
	})

	It("runs every part by default", func() {
		o, err := parse(nil)
		Expect(err).NotTo(HaveOccurred())
		Expect(o.parts).To(BeEmpty())
		Expect(o.rounds).To(Equal(5))
	})

	DescribeTable("refuses", func(args ...string) {
		_, err := parse(args)
		Expect(err).To(HaveOccurred())
	},
		Entry("an unknown part", "relays"),
		Entry("no rounds", "--rounds=0"),
		Entry("a scale above 1", "--scale=2"),
	)
})
