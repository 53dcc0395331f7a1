package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// results holds the results of a run. Other programs read them as JSON.
type results struct {
	At       time.Time `json:"at"`
	Machine  machine   `json:"machine"`
	Rounds   int       `json:"rounds"`
	Scale    float64   `json:"scale"`
	Figures  []figure  `json:"figures"`
	Measured []summary `json:"measured"`
}

// summary is the content of a series in the results.
type summary struct {
	Name    string  `json:"name"`
	Unit    string  `json:"unit"`
	Median  float64 `json:"median"`
	Lowest  float64 `json:"lowest"`
	Highest float64 `json:"highest"`
	// Values has a value for each round.
	Values []float64 `json:"values,omitempty"`
}

// figure is one result of a run.
type figure struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	// Of and Against name the two series of a ratio.
	Of      string `json:"of,omitempty"`
	Against string `json:"against,omitempty"`
}

// text returns the value with three significant digits.
func (f figure) text() string { return significant(f.Value) }

func significant(value float64) string {
	const digits = 3
	if math.Abs(value) >= 100 {
		return strconv.FormatFloat(math.Round(value), 'f', 0, 64)
	}
	return strconv.FormatFloat(value, 'g', digits, 64)
}

// series holds the values of one measure, one for each round.
type series struct {
	Name   string
	Unit   string
	Values []float64
}

func (s *series) add(value float64) { s.Values = append(s.Values, value) }

func (s *series) median() float64 { return median(s.Values) }

func (s *series) summary() summary {
	return summary{
		Name: strings.TrimSpace(s.Name), Unit: s.Unit, Values: s.Values,
		Median: s.median(), Lowest: slices.Min(s.Values), Highest: slices.Max(s.Values),
	}
}

// show prints the median, the lowest and the highest value.
func (s *series) show(out io.Writer) {
	fmt.Fprintf(out, "  %-44s %10s %-9s (%s to %s, %d runs)\n", s.Name, significant(s.median()), s.Unit,
		significant(slices.Min(s.Values)), significant(slices.Max(s.Values)), len(s.Values))
}

func median(values []float64) float64 { return percentile(values, 0.5) }

// percentile returns the percentile of the values at a share from 0 to 1, interpolated
// between neighbours. Without values it returns NaN.
func percentile(values []float64, share float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	place := share * float64(len(sorted)-1)
	below := int(place)
	above := min(below+1, len(sorted)-1)
	return sorted[below] + (sorted[above]-sorted[below])*(place-float64(below))
}

// tenths returns the median of the first tenth of the values and the median of the
// last tenth.
func tenths(values []float64) (first, last float64) {
	n := max(1, len(values)/10)
	return median(values[:n]), median(values[len(values)-n:])
}

// newSeries starts a series and adds it to the results.
func (b *bench) newSeries(name, unit string) *series {
	s := &series{Name: name, Unit: unit}
	b.measured = append(b.measured, s)
	return s
}

// figure adds a result.
func (b *bench) figure(name string, value float64) {
	b.figures = append(b.figures, figure{Name: name, Value: value})
}

// compare adds the ratio of two series as a result.
func (b *bench) compare(name string, of, against *series) {
	b.figures = append(b.figures, figure{Name: name, Value: ratios(of, against), Of: of.Name, Against: against.Name})
}

// ratios divides the value of each round by the reference of the same round, and
// returns the median. A disturbance that lasts longer than a round affects both.
func ratios(values, references *series) float64 {
	of := make([]float64, len(values.Values))
	for i := range of {
		of[i] = values.Values[i] / references.Values[i]
	}
	return median(of)
}
