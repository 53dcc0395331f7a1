package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
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
	DescribeTable("a percentile is between the values that it falls between",
		func(values []float64, share, expected float64) {
			Expect(percentile(values, share)).To(BeNumerically("~", expected, 1e-9))
		},
		Entry("one", []float64{7}, 0.99, 7.0),
		Entry("the median of three, in any order", []float64{9, 1, 5}, 0.5, 5.0),
		Entry("the median of four", []float64{4, 1, 3, 2}, 0.5, 2.5),
		Entry("the lowest", []float64{4, 1, 3, 2}, 0.0, 1.0),
		Entry("the highest", []float64{4, 1, 3, 2}, 1.0, 4.0),
	)

	It("are no numbers where there is nothing", func() {
		Expect(math.IsNaN(median(nil))).To(BeTrue())
	})

	It("compare the first tenth with the last", func() {
		var values []float64
		for i := range 40 {
			values = append(values, float64(i))
		}
		first, last := tenths(values)
		Expect(first).To(Equal(1.5))
		Expect(last).To(Equal(37.5))
	})

	It("compare round by round, whatever the rounds have to do with each other", func() {
		fast, slow := &series{Values: []float64{10, 1000, 30}}, &series{Values: []float64{5, 500, 15}}
		Expect(ratios(fast, slow)).To(Equal(2.0))
	})

	DescribeTable("have three digits", func(value float64, text string) {
		Expect(significant(value)).To(Equal(text))
	},
		Entry(nil, 0.12345, "0.123"), Entry(nil, 1.0, "1"), Entry(nil, 99.96, "100"), Entry(nil, 123.5, "124"), Entry(nil, 1234567.0, "1234567"),
	)

	It("have no CPU time of clients in them", func() {
		Expect(withoutClients(100, time.Second, 0)).To(Equal(100.0))
		Expect(withoutClients(100, time.Second, time.Second/2)).To(BeNumerically(">", 100))
	})
})

var _ = Describe("The page", func() {
	measured := results{
		Figures: []figure{{"relay_vs_pipe", 1.25}},
		Measured: []series{
			{Name: "one relay", Unit: "events/s", Values: []float64{100, 300, 200}},
			{Name: "a <step>", Unit: "s", Values: []float64{1}},
			{Name: "users & events", Unit: "1/s", Values: []float64{5}},
		},
	}

	It("gets the table and a chart in the place for them, again and again", func() {
		path := filepath.Join(GinkgoT().TempDir(), "page.md")
		Expect(os.WriteFile(path, []byte("before\n"+runBegins+"old\n"+runEnds+"after\n"), 0o600)).To(Succeed())
		for range 2 {
			Expect(writePage(path, measured)).To(Succeed())
		}
		page, err := os.ReadFile(path)
		Expect(err).NotTo(HaveOccurred())
		Expect(string(page)).To(And(HavePrefix("before\n"+runBegins), HaveSuffix(runEnds+"after\n"), Not(ContainSubstring("old")),
			ContainSubstring("| `relay_vs_pipe` | 1.25 |"), ContainSubstring("| one relay | 200 | 100 | 300 | events/s |")))
		Expect(filepath.Join(filepath.Dir(path), "benchmarks.svg")).To(BeAnExistingFile())
	})

	It("is left alone where it has no place for them", func() {
		path := filepath.Join(GinkgoT().TempDir(), "page.md")
		Expect(os.WriteFile(path, []byte("before\n"), 0o600)).To(Succeed())
		Expect(writePage(path, measured)).To(MatchError(ContainSubstring("lacks one of the lines")))
	})

	It("has a chart that is XML, with a bar for each rate and a dot for each round", func() {
		chart := xml.NewDecoder(bytes.NewReader(drawChart(measured.Measured)))
		elements := make(map[string]int)
		for {
			token, err := chart.Token()
			if errors.Is(err, io.EOF) {
				break
			}
			Expect(err).NotTo(HaveOccurred())
			if start, ok := token.(xml.StartElement); ok {
				elements[start.Name.Local]++
			}
		}
		Expect(elements).To(And(HaveKeyWithValue("circle", 4), HaveKeyWithValue("rect", 1+2)))
	})
})

var _ = Describe("The command line", func() {
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
		Entry("a part that there is not", "relays"),
		Entry("no rounds", "--rounds=0"),
		Entry("a scale above 1", "--scale=2"),
	)
})
