package deploy_test

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/template"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
)

var promQL = parser.NewParser(parser.Options{})

// readRules reads and validates the rules.
var readRules = sync.OnceValue(func() (rules []rulefmt.Rule) {
	groups, problems := rulefmt.ParseFile("../../deploy/prometheus/diehard.rules.yaml", false, model.UTF8Validation, promQL, slog.Default())
	Expect(problems).To(BeEmpty())
	for _, group := range groups.Groups {
		rules = append(rules, group.Rules...)
	}
	return rules
})

// value is a sample of a series: a number, or a native histogram.
type value struct {
	number    float64
	histogram *histogram.FloatHistogram
}

// A series is a time series that a server has scraped.
type series interface {
	name() labels.Labels
	// between returns the samples from a time to another, in the order of their times.
	between(from, to time.Time) []chunks.Sample
}

// sample implements chunks.Sample.
type sample struct {
	t int64
	v value
}

func (s sample) T() int64                      { return s.t }
func (s sample) ST() int64                     { return 0 }
func (s sample) F() float64                    { return s.v.number }
func (s sample) H() *histogram.Histogram       { return nil }
func (s sample) FH() *histogram.FloatHistogram { return s.v.histogram }
func (s sample) Copy() chunks.Sample           { return s }
func (s sample) Type() chunkenc.ValueType {
	if s.v.histogram != nil {
		return chunkenc.ValFloatHistogram
	}
	return chunkenc.ValFloat
}

// seriesSet implements storage.SeriesSet.
type seriesSet struct {
	all []storage.Series
	i   int
}

func (s *seriesSet) Next() bool                      { s.i++; return s.i <= len(s.all) }
func (s *seriesSet) At() storage.Series              { return s.all[s.i-1] }
func (*seriesSet) Err() error                        { return nil }
func (*seriesSet) Warnings() annotations.Annotations { return nil }

// server evaluates rules as a Prometheus server does that scrapes the series.
type server struct {
	engine  *promql.Engine
	rules   []rulefmt.Rule
	step    time.Duration // between two evaluations
	scraped func() []series
	results map[string]map[time.Time]promql.Vector // by the expression and the time
}

func newServer(rules []rulefmt.Rule, step time.Duration, scraped func() []series) *server {
	return &server{
		engine: promql.NewEngine(promql.EngineOpts{
			MaxSamples: 1_000_000, Timeout: time.Minute, LookbackDelta: 5 * time.Minute, Parser: promQL,
			NoStepSubqueryIntervalFn: func(int64) int64 { return step.Milliseconds() },
		}),
		rules: rules, step: step, scraped: scraped, results: map[string]map[time.Time]promql.Vector{},
	}
}

// query evaluates an expression at a time, and remembers the result. It evaluates the
// recording rules whose results the expression reads.
func (s *server) query(ctx context.Context, expr string, at time.Time) promql.Vector {
	GinkgoHelper()
	if known, ok := s.results[expr][at]; ok {
		return known
	}
	queryable := &storage.MockQueryable{MockQuerier: &storage.MockQuerier{
		SelectMockFunction: func(_ bool, hints *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
			if rule := s.recording(matchers); rule != nil {
				return &seriesSet{all: s.record(ctx, rule, at)}
			}
			set := &seriesSet{}
			for _, candidate := range s.scraped() {
				if matches(candidate.name(), matchers) {
					samples := candidate.between(time.UnixMilli(hints.Start), time.UnixMilli(hints.End))
					set.all = append(set.all, storage.NewListSeries(candidate.name(), samples))
				}
			}
			return set
		},
	}}
	query, err := s.engine.NewInstantQuery(ctx, queryable, nil, expr, at)
	Expect(err).NotTo(HaveOccurred(), expr)
	defer query.Close()
	result := query.Exec(ctx)
	vector, err := result.Vector()
	Expect(err).NotTo(HaveOccurred(), expr)
	Expect(result.Warnings).To(BeEmpty(), expr)
	if s.results[expr] == nil {
		s.results[expr] = map[time.Time]promql.Vector{}
	}
	s.results[expr][at] = slices.Clone(vector)
	return s.results[expr][at]
}

// recording returns the recording rule that the matchers name, or nil.
func (s *server) recording(matchers []*labels.Matcher) *rulefmt.Rule {
	for i, rule := range s.rules {
		if rule.Record != "" && slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return m.Name == model.MetricNameLabel && m.Matches(rule.Record) }) {
			return &s.rules[i]
		}
	}
	return nil
}

// record returns the results of a recording rule.
func (s *server) record(ctx context.Context, rule *rulefmt.Rule, at time.Time) (results []storage.Series) {
	GinkgoHelper()
	for _, element := range s.query(ctx, rule.Expr, at) {
		name := labels.NewBuilder(element.Metric).Set(model.MetricNameLabel, rule.Record).Labels()
		results = append(results, storage.NewListSeries(name, []chunks.Sample{sample{at.UnixMilli(), value{number: element.F}}}))
	}
	return results
}

func matches(found labels.Labels, matchers []*labels.Matcher) bool {
	return !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(found.Get(m.Name)) })
}

// alert is a firing alert, with its annotations.
type alert struct {
	name, severity, summary, description string
	labels                               map[string]string
}

// alerts returns the alerts that fire at a time. An alert fires if its expression has had a
// result with the same labels at each evaluation of the time "for".
func (s *server) alerts(ctx context.Context, at time.Time) (firing []alert) {
	GinkgoHelper()
	for _, rule := range s.rules {
		if rule.Alert == "" {
			continue
		}
		for _, element := range s.query(ctx, rule.Expr, at) {
			if s.fires(ctx, rule, element.Metric, at) {
				firing = append(firing, expand(ctx, rule, element, at))
			}
		}
	}
	return firing
}

func (s *server) fires(ctx context.Context, rule rulefmt.Rule, metric labels.Labels, at time.Time) bool {
	GinkgoHelper()
	// An alert has no name of a metric. The name can differ between the parts of an "or".
	unnamed := func(l labels.Labels) labels.Labels {
		return l.DropReserved(func(name string) bool { return name == model.MetricNameLabel })
	}
	for ago := s.step; ago <= time.Duration(rule.For); ago += s.step {
		if !slices.ContainsFunc(s.query(ctx, rule.Expr, at.Add(-ago)), func(e promql.Sample) bool { return labels.Equal(unnamed(e.Metric), unnamed(metric)) }) {
			return false
		}
	}
	return true
}

// expand expands the templates of an alert as the server does.
func expand(ctx context.Context, rule rulefmt.Rule, element promql.Sample, at time.Time) alert {
	GinkgoHelper()
	found := element.Metric.Map()
	delete(found, model.MetricNameLabel)
	text := func(name string) string {
		GinkgoHelper()
		data := template.AlertTemplateData(found, nil, "", element)
		expander := template.NewTemplateExpander(ctx, "{{$labels := .Labels}}{{$value := .Value}}"+rule.Annotations[name], rule.Alert, data,
			model.TimeFromUnix(at.Unix()), nil, nil, nil)
		expanded, err := expander.Expand()
		Expect(err).NotTo(HaveOccurred())
		return strings.TrimSpace(expanded)
	}
	return alert{rule.Alert, rule.Labels["severity"], text("summary"), text("description"), found}
}

// metricNames returns the names of the metrics in an expression, and the labels by which it
// selects their series.
func metricNames(expr string) map[string][]string {
	GinkgoHelper()
	parsed, err := promQL.ParseExpr(expr)
	Expect(err).NotTo(HaveOccurred(), expr)
	names := map[string][]string{}
	parser.Inspect(parsed, func(node parser.Node, _ []parser.Node) error {
		if selector, ok := node.(*parser.VectorSelector); ok {
			for _, matcher := range selector.LabelMatchers {
				if matcher.Name != model.MetricNameLabel {
					names[selector.Name] = append(names[selector.Name], matcher.Name)
				}
			}
			if names[selector.Name] == nil {
				names[selector.Name] = []string{}
			}
		}
		return nil
	})
	return names
}

// groupings returns the labels by which an expression groups series.
func groupings(expr string) (names []string) {
	GinkgoHelper()
	parsed, err := promQL.ParseExpr(expr)
	Expect(err).NotTo(HaveOccurred(), expr)
	parser.Inspect(parsed, func(node parser.Node, _ []parser.Node) error {
		if aggregate, ok := node.(*parser.AggregateExpr); ok {
			names = append(names, aggregate.Grouping...)
		}
		return nil
	})
	return names
}
