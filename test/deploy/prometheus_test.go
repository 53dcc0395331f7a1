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

// step is the time between two scrapes, and between two evaluations of the rules.
const step = time.Minute

// now is the time of the evaluation in the specs.
var now = time.Date(2026, 11, 24, 3, 12, 0, 0, time.UTC)

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

// series is a time series. at returns its sample of a time before now, or false if the
// series has no sample then.
type series struct {
	labels labels.Labels
	at     func(ago time.Duration) (value, bool)
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
	engine   *promql.Engine
	rules    []rulefmt.Rule
	scraped  []series
	recorded map[string]map[time.Duration]promql.Vector // by the name of the rule and the time before now
}

func newServer(rules []rulefmt.Rule, scraped []series) *server {
	return &server{
		engine: promql.NewEngine(promql.EngineOpts{
			MaxSamples: 1_000_000, Timeout: time.Minute, LookbackDelta: 5 * time.Minute, Parser: promQL,
			NoStepSubqueryIntervalFn: func(int64) int64 { return step.Milliseconds() },
		}),
		rules: rules, scraped: scraped, recorded: map[string]map[time.Duration]promql.Vector{},
	}
}

// query evaluates an expression at a time before now. It evaluates the recording rules
// whose results the expression reads.
func (s *server) query(ctx context.Context, expr string, ago time.Duration) promql.Vector {
	GinkgoHelper()
	queryable := &storage.MockQueryable{MockQuerier: &storage.MockQuerier{
		SelectMockFunction: func(_ bool, hints *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
			set := &seriesSet{}
			for _, candidate := range append(s.record(ctx, matchers, ago), s.scraped...) {
				if matches(candidate.labels, matchers) {
					set.all = append(set.all, storage.NewListSeries(candidate.labels, samples(candidate, hints)))
				}
			}
			return set
		},
	}}
	query, err := s.engine.NewInstantQuery(ctx, queryable, nil, expr, now.Add(-ago))
	Expect(err).NotTo(HaveOccurred(), expr)
	defer query.Close()
	result := query.Exec(ctx)
	vector, err := result.Vector()
	Expect(err).NotTo(HaveOccurred(), expr)
	Expect(result.Warnings).To(BeEmpty(), expr)
	return slices.Clone(vector)
}

// record returns the results of the recording rules that the matchers name.
func (s *server) record(ctx context.Context, matchers []*labels.Matcher, ago time.Duration) (results []series) {
	GinkgoHelper()
	for _, rule := range s.rules {
		if rule.Record == "" || !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return m.Name == model.MetricNameLabel && m.Matches(rule.Record) }) {
			continue
		}
		if s.recorded[rule.Record] == nil {
			s.recorded[rule.Record] = map[time.Duration]promql.Vector{}
		}
		vector, ok := s.recorded[rule.Record][ago]
		if !ok {
			vector = s.query(ctx, rule.Expr, ago)
			s.recorded[rule.Record][ago] = vector
		}
		for _, element := range vector {
			results = append(results, series{
				labels.NewBuilder(element.Metric).Set(model.MetricNameLabel, rule.Record).Labels(),
				func(at time.Duration) (value, bool) { return value{number: element.F}, at == ago },
			})
		}
	}
	return results
}

func matches(found labels.Labels, matchers []*labels.Matcher) bool {
	return !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(found.Get(m.Name)) })
}

func samples(s series, hints *storage.SelectHints) (all []chunks.Sample) {
	first := min(history, now.Sub(time.UnixMilli(hints.Start)).Truncate(step))
	for ago := first; ago >= 0 && now.Add(-ago).UnixMilli() <= hints.End; ago -= step {
		if v, ok := s.at(ago); ok {
			all = append(all, sample{now.Add(-ago).UnixMilli(), v})
		}
	}
	return all
}

// alert is a firing alert, with its annotations.
type alert struct {
	name, severity, summary, description string
	labels                               map[string]string
}

// alerts returns the alerts that fire now. An alert fires if its expression has had a
// result with the same labels at each evaluation of the time "for".
func (s *server) alerts(ctx context.Context) (firing []alert) {
	GinkgoHelper()
	for _, rule := range s.rules {
		if rule.Alert == "" {
			continue
		}
		for _, element := range s.query(ctx, rule.Expr, 0) {
			if s.hasFired(ctx, rule, element.Metric) {
				firing = append(firing, expand(ctx, rule, element))
			}
		}
	}
	return firing
}

func (s *server) hasFired(ctx context.Context, rule rulefmt.Rule, metric labels.Labels) bool {
	GinkgoHelper()
	for ago := step; ago <= time.Duration(rule.For); ago += step {
		if !slices.ContainsFunc(s.query(ctx, rule.Expr, ago), func(e promql.Sample) bool { return labels.Equal(e.Metric, metric) }) {
			return false
		}
	}
	return true
}

// expand expands the templates of an alert as the server does.
func expand(ctx context.Context, rule rulefmt.Rule, element promql.Sample) alert {
	GinkgoHelper()
	found := element.Metric.Map()
	delete(found, model.MetricNameLabel)
	text := func(name string) string {
		GinkgoHelper()
		data := template.AlertTemplateData(found, nil, "", element)
		expander := template.NewTemplateExpander(ctx, "{{$labels := .Labels}}{{$value := .Value}}"+rule.Annotations[name], rule.Alert, data,
			model.TimeFromUnix(now.Unix()), nil, nil, nil)
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
