package page

import (
	"fmt"
	"html/template"
	"math"
	"strings"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay/status"
)

// chart is a line chart of the last hour, for the template chart.
type chart struct {
	ID, Title string
	// Now is the last figure, for example "12 events".
	Now string
	// Summary describes the chart for a screen reader.
	Summary string
	Lines   []line
	// Ticks are the values of the vertical axis.
	Ticks []tick
	// Empty says that the hour has no figure.
	Empty bool
}

// line is a line of a chart. Paths are SVG paths, because a line has gaps where its figure
// is unknown.
type line struct {
	Class, Name, Now string
	Path, Area       template.HTMLAttr
}

// tick is a value of the vertical axis at its height.
type tick struct {
	Y    float64
	Text string
}

// Label is the base line of the tick's text, below its line.
func (t tick) Label() float64 { return t.Y + 10 }

// The charts' coordinates. The template has the same view box.
const (
	chartWidth  = 360.0
	chartHeight = 96.0
	chartTop    = 6.0 // above the highest value
)

// figure is one figure of the samples.
type figure struct {
	class, name string
	of          func(sample) float64
}

// unit is the unit of a chart: how a figure is written, the least end of the axis, and the
// axis for values up to most.
type unit struct {
	format func(float64) string
	least  float64
	axis   func(most float64) axis
}

// axis is a vertical axis. share returns the height of a value, from 0 to 1.
type axis struct {
	ticks []float64
	share func(value float64) float64
}

func (a axis) y(value float64) float64 { return chartHeight - a.share(value)*(chartHeight-chartTop) }

// linear returns an axis from 0 to end.
func linear(end float64) axis {
	return axis{[]float64{end, end / 2}, func(value float64) float64 { return value / end }}
}

// countAxis ends at 1, 2 or 4 times a power of ten, so that the half is a whole number.
func countAxis(most float64) axis {
	power := math.Pow(10, math.Floor(math.Log10(most)))
	for _, factor := range []float64{1, 2, 4} {
		if most <= factor*power {
			return linear(factor * power)
		}
	}
	return linear(10 * power)
}

// durationAxis ends at a duration in seconds that people say.
func durationAxis(most float64) axis {
	const minute, hour, day = 60, 3600, 86400
	for _, end := range []float64{
		0.1, 0.2, 0.4, 1, 2, 4, 10, 20, 40, minute, 2 * minute, 4 * minute, 10 * minute, 20 * minute, 40 * minute,
		hour, 2 * hour, 4 * hour, 8 * hour, 12 * hour, day, 2 * day, 4 * day, 10 * day,
	} {
		if most <= end {
			return linear(end)
		}
	}
	return linear(most)
}

// powersAxis has a power of ten at each tick, from 10 milliseconds.
func powersAxis(most float64) axis {
	const low = 0.01
	powers := math.Ceil(math.Log10(max(most, 10*low)/low) - 1e-9)
	a := axis{share: func(value float64) float64 { return math.Log10(max(value, low)/low) / powers }}
	for power := powers; power >= 1; power-- {
		a.ticks = append(a.ticks, low*math.Pow(10, power))
	}
	return a
}

// newCharts draws the samples.
func newCharts(samples []sample, now time.Time) []chart {
	count := func(v float64) string { return status.Count(int64(math.Round(v))) }
	duration := func(v float64) string { return status.Duration(time.Duration(v * float64(time.Second))) }
	rate := func(v float64) string {
		if v > 0 && v < 10 {
			return fmt.Sprintf("%.1f/s", v)
		}
		return count(v) + "/s"
	}
	return []chart{
		newChart("backlog", "Events that wait", samples, now, unit{count, 2, countAxis},
			figure{"one", "", func(s sample) float64 { return s.backlog }}),
		newChart("age", "Age of the oldest event", samples, now, unit{duration, 0.1, durationAxis},
			figure{"one", "", func(s sample) float64 { return s.age }}),
		newChart("rate", "Delivered by this relay", samples, now, unit{rate, 2, countAxis},
			figure{"one", "", func(s sample) float64 { return s.rate }}),
		newChart("latency", "Delivery time, this relay", samples, now, unit{duration, 0.01, powersAxis},
			figure{"one", "p50", func(s sample) float64 { return s.p50 }},
			figure{"two", "p95", func(s sample) float64 { return s.p95 }},
			figure{"three", "p99", func(s sample) float64 { return s.p99 }}),
	}
}

// newChart draws figures of the samples.
func newChart(id, title string, samples []sample, now time.Time, in unit, figures ...figure) chart {
	c := chart{ID: id, Title: title, Empty: true}
	most, at := in.least, now
	for _, s := range samples {
		for _, f := range figures {
			if value := f.of(s); !math.IsNaN(value) {
				c.Empty = false
				if value > most {
					most, at = value, s.at
				}
			}
		}
	}
	vertical := in.axis(most)
	for _, value := range vertical.ticks {
		c.Ticks = append(c.Ticks, tick{vertical.y(value), in.format(value)})
	}
	last := make([]string, 0, len(figures))
	for _, f := range figures {
		l := line{Class: f.class, Name: f.name, Now: "none"}
		l.Path, l.Area = path(samples, now, vertical, f.of)
		for _, s := range samples {
			if value := f.of(s); !math.IsNaN(value) {
				l.Now = in.format(value)
			}
		}
		last = append(last, strings.TrimSpace(f.name+" "+l.Now))
		c.Lines = append(c.Lines, l)
	}
	c.Now = strings.Join(last, ", ")
	c.Summary = "No figure in the last hour."
	if !c.Empty {
		c.Summary = fmt.Sprintf("Last: %s. Highest in the last hour: %s at %s.", c.Now, in.format(most), status.At(at))
		if at.Equal(now) { // nothing exceeds the least height of the axis
			c.Summary = fmt.Sprintf("Last: %s. Never above %s in the last hour.", c.Now, in.format(most))
		}
	}
	return c
}

// path returns the line through the samples, and the area below it.
func path(samples []sample, now time.Time, vertical axis, of func(sample) float64) (line, area template.HTMLAttr) {
	var lines, areas strings.Builder
	hour := sampleInterval * keptSamples
	var from, to float64
	var before time.Time
	end := func() {
		if areas.Len() > 0 && !before.IsZero() {
			fmt.Fprintf(&areas, "L%.1f %.1fL%.1f %.1fZ", to, chartHeight, from, chartHeight)
		}
		before = time.Time{}
	}
	for _, s := range samples {
		value := of(s)
		if math.IsNaN(value) || !before.IsZero() && s.at.Sub(before) > 3*sampleInterval {
			end()
		}
		x := chartWidth * (1 - now.Sub(s.at).Seconds()/hour.Seconds())
		if math.IsNaN(value) || x < 0 {
			continue
		}
		command := "L"
		if before.IsZero() {
			command, from = "M", x
		}
		y := vertical.y(value)
		fmt.Fprintf(&lines, "%s%.1f %.1f", command, x, y)
		fmt.Fprintf(&areas, "%s%.1f %.1f", command, x, y)
		if before.IsZero() { // a line of one point has a length, so that it is visible
			fmt.Fprintf(&lines, "h0.1")
		}
		to, before = x, s.at
	}
	end()
	return template.HTMLAttr(`d="` + lines.String() + `"`), template.HTMLAttr(`d="` + areas.String() + `"`) //nolint:gosec // numbers only
}
