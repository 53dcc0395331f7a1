package deploy_test

import (
	"os"
	"regexp"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/prometheus/model/labels"
)

func readDoc(name string) string {
	GinkgoHelper()
	content, err := os.ReadFile("../../docs/" + name)
	Expect(err).NotTo(HaveOccurred())
	return string(content)
}

var (
	metricRow = regexp.MustCompile("(?m)^ *\\| `(diehard_[a-z_]+)` \\|([^|]*)\\| ([^|]*)\\|$")
	codeWord  = regexp.MustCompile("`([a-z_]+)`")
	family    = regexp.MustCompile("`([a-z_]+_)\\*`")
)

// documented are the metrics of docs/metrics.md.
type documented struct {
	labels     map[string][]string // of each metric
	histograms []string
	families   []string // prefixes of the metrics of libraries
}

func readMetrics() documented {
	GinkgoHelper()
	d, page := documented{labels: map[string][]string{}}, readDoc("metrics.md")
	for _, row := range metricRow.FindAllStringSubmatch(page, -1) {
		d.labels[row[1]] = []string{"job", "instance", "outbox"}
		for _, label := range codeWord.FindAllStringSubmatch(row[2], -1) {
			d.labels[row[1]] = append(d.labels[row[1]], label[1])
		}
		if strings.HasPrefix(row[3], "Histogram") {
			d.histograms = append(d.histograms, row[1])
		}
	}
	for _, prefix := range family.FindAllStringSubmatch(page, -1) {
		d.families = append(d.families, prefix[1])
	}
	Expect(d.labels).NotTo(BeEmpty())
	Expect(d.histograms).NotTo(BeEmpty())
	return d
}

// labelsOf returns the labels of a time series, or nil if no metric has this series.
func (d documented) labelsOf(name string) []string {
	for _, histogram := range d.histograms {
		switch name {
		case histogram + "_bucket":
			return append(slices.Clone(d.labels[histogram]), labels.BucketLabel)
		case histogram + "_sum", histogram + "_count":
			return d.labels[histogram]
		}
	}
	if slices.ContainsFunc(d.families, func(prefix string) bool { return strings.HasPrefix(name, prefix) }) {
		return []string{"job", "instance"}
	}
	return d.labels[name]
}

var _ = Describe("The rules and the dashboard", func() {
	It("use metrics and labels of docs/metrics.md", func() {
		metrics := readMetrics()
		expressions := readDashboard().expressions()
		recorded := map[string]bool{}
		for _, rule := range readRules() {
			expressions = append(expressions, rule.Expr)
			if rule.Record != "" {
				recorded[rule.Record] = true
			}
		}
		for _, expression := range expressions {
			all := []string{}
			for name, selected := range metricNames(expression) {
				known := metrics.labelsOf(name)
				if recorded[name] {
					known = []string{"job", "outbox"}
				}
				Expect(known).NotTo(BeEmpty(), "%s in %s", name, expression)
				for _, label := range selected {
					Expect(known).To(ContainElement(label), "%s in %s", name, expression)
				}
				all = append(all, known...)
			}
			for _, label := range groupings(expression) {
				Expect(all).To(ContainElement(label), expression)
			}
		}
	})
})
