package main

import (
	"bytes"
	"fmt"
	"html"
	"slices"
	"strings"
)

// group is a section of the chart: ratios below a heading.
type group struct {
	heading string
	figures []string
}

var groups = []group{
	{"Draining the outbox", []string{"relay_vs_pipe", "relay_vs_watermill", "relay_vs_river", "replicas_8_vs_1"}},
	{"Creating users", []string{"api_vs_pgbench_cte_c8", "api_vs_pgbench_cte_c32", "api_keyed_vs_pgbench_c32", "batch_vs_copy"}},
	{"Creating a user while ClickHouse is down", []string{"api_p99_outage_ratio"}},
	{"With traces whose collector hangs", []string{"api_traces_hanging", "relay_traces_hanging"}},
	{"CPU time with traces whose collector hangs", []string{"api_traces_hanging_cpu", "relay_traces_hanging_cpu"}},
	{"Publishing in a transaction", []string{"publish_overhead"}},
	{"The end of a backlog compared with its beginning", []string{"cut_growth_5m", "cut_growth_pinned", "poll_growth_pinned", "claim_growth_pinned"}},
	{"The size of the outbox on the disk", []string{"outbox_size_10m_vs_1m"}},
}

// comparison is a series of Diehard and its reference series. All of them are drawn
// to the same scale.
type comparison struct {
	of      summary
	against []reference
}

type reference struct {
	summary

	ratio figure
}

// comparisons returns the comparisons of a group that the run has measured.
func comparisons(r results, g group) (found []comparison) {
	byName := make(map[string]summary, len(r.Measured))
	for _, s := range r.Measured {
		byName[s.Name] = s
	}
	for _, f := range r.Figures {
		of, measured := byName[f.Of]
		if !measured || !slices.Contains(g.figures, f.Name) {
			continue
		}
		if len(found) == 0 || found[len(found)-1].of.Name != of.Name {
			found = append(found, comparison{of: of})
		}
		last := &found[len(found)-1]
		last.against = append(last.against, reference{byName[f.Against], f})
	}
	return found
}

// longest returns the end of the comparison's longest bar or line.
func (c comparison) longest() float64 {
	value := c.of.Highest
	for _, other := range c.against {
		value = max(value, other.Highest)
	}
	return value
}

const chartTitle = "Diehard compared with its references"

// The chart's dimensions in pixels.
const (
	chartWidth    = 860
	chartMargin   = 24
	labelEnd      = 344 // right edge of the labels
	barStart      = 356
	barWidth      = 290 // of the longest bar
	barHeight     = 14
	rowHeight     = 22
	comparisonGap = 10
	headingHeight = 30
	groupGap      = 16
	topHeight     = 92
	bottomHeight  = 48
	whiskerHeight = 6
)

// A page that embeds the chart as an image cannot style it. Therefore the chart
// has its own background, and its colours follow the reader's colour scheme.
const chartStyle = `<style>
  text { font: 13px -apple-system, BlinkMacSystemFont, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328; }
  .title { font-size: 18px; font-weight: 600; }
  .heading { font-size: 14px; font-weight: 600; }
  .ratio { font-size: 17px; font-weight: 600; }
  .small { font-size: 12px; }
  .small, .reference-label { fill: #59636e; }
  .background { fill: #ffffff; stroke: #d1d9e0; }
  .rule { stroke: #d1d9e0; }
  .diehard { fill: #218bff; }
  .reference { fill: #afb8c1; }
  .whisker { stroke: #1f2328; stroke-width: 1.25; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .small, .reference-label { fill: #9198a1; }
    .background { fill: #0d1117; stroke: #3d444d; }
    .rule { stroke: #3d444d; }
    .diehard { fill: #4493f8; }
    .reference { fill: #656c76; }
    .whisker { stroke: #f0f6fc; }
  }
</style>
`

// canvas collects the chart from top to bottom.
type canvas struct {
	bytes.Buffer

	y int
}

// drawChart draws the run's ratios: for each ratio its two series as bars.
func drawChart(r results) []byte {
	c := &canvas{y: topHeight}
	for _, g := range groups {
		if found := comparisons(r, g); len(found) > 0 {
			c.group(g.heading, found)
		}
	}
	height := c.y + bottomHeight

	var svg bytes.Buffer
	fmt.Fprintf(&svg, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" role="img">`+"\n",
		chartWidth, height, chartWidth, height)
	svg.WriteString("<title>" + chartTitle + "</title>\n" + chartStyle)
	fmt.Fprintf(&svg, `<rect class="background" x="0.5" y="0.5" width="%d" height="%d" rx="8"/>`+"\n", chartWidth-1, height-1)
	top := &canvas{}
	top.text(chartMargin, 34, "title", "", chartTitle)
	top.bar("diehard", chartMargin, 50, barHeight)
	top.text(chartMargin+22, 62, "small", "", "Diehard")
	top.bar("reference", chartMargin+88, 50, barHeight)
	top.text(chartMargin+110, 62, "small", "", "reference")
	top.text(chartMargin, 84, "small", "", fmt.Sprintf(
		"Bar: median of %d rounds. Line: lowest to highest. Ratio: Diehard over the reference, median of the rounds' ratios.", r.Rounds))
	svg.Write(top.Bytes())
	svg.Write(c.Bytes())
	c.Reset()
	c.text(chartMargin, height-14, "small", "", r.circumstances())
	svg.Write(c.Bytes())
	svg.WriteString("</svg>\n")
	return svg.Bytes()
}

func (c *canvas) group(heading string, found []comparison) {
	c.y += groupGap
	fmt.Fprintf(c, `<line class="rule" x1="%d" y1="%d" x2="%d" y2="%d"/>`+"\n", chartMargin, c.y, chartWidth-chartMargin, c.y)
	c.text(chartMargin, c.y+24, "heading", "", heading)
	better := "shorter is better"
	if strings.HasSuffix(found[0].of.Unit, "/s") {
		better = "longer is better"
	}
	c.text(chartWidth-chartMargin, c.y+24, "small", "end", better)
	c.y += headingHeight
	for _, compared := range found {
		c.comparison(compared)
	}
}

func (c *canvas) comparison(compared comparison) {
	c.y += comparisonGap
	scale := barWidth / compared.longest()
	top := c.y
	c.row("diehard", compared.of, scale)
	for _, other := range compared.against {
		c.row("reference", other.summary, scale)
		middle := c.y - rowHeight/2 // of the reference's row
		if len(compared.against) == 1 {
			middle = (top + c.y) / 2
		}
		c.text(chartWidth-chartMargin, middle+6, "ratio", "end", other.ratio.text()+"×")
	}
}

// row draws one series: its name, its bar, its range and its median.
func (c *canvas) row(kind string, s summary, scale float64) {
	middle := c.y + rowHeight/2
	label := ""
	if kind == "reference" {
		label = "reference-label"
	}
	c.text(labelEnd, middle+5, label, "end", s.Name)
	c.bar(kind, barStart, middle-barHeight/2, s.Median*scale)
	low, high := barStart+s.Lowest*scale, barStart+s.Highest*scale
	fmt.Fprintf(c, `<path class="whisker" fill="none" d="M%.1f %d v%d M%.1f %d H%.1f M%.1f %d v%d"/>`+"\n",
		low, middle-whiskerHeight/2, whiskerHeight, low, middle, high, high, middle-whiskerHeight/2, whiskerHeight)
	c.text(max(high, barStart+s.Median*scale)+8, middle+5, "small", "", withUnit(s.Median, s.Unit))
	c.y += rowHeight
}

func (c *canvas) bar(kind string, x, y int, width float64) {
	fmt.Fprintf(c, `<rect class="%s" x="%d" y="%d" width="%.1f" height="%d" rx="2"/>`+"\n", kind, x, y, width, barHeight)
}

// text writes text that begins at x, or ends there if the anchor is "end".
func (c *canvas) text(x float64, y int, class, anchor, content string) {
	fmt.Fprintf(c, `<text x="%.1f" y="%d"`, x, y)
	if class != "" {
		fmt.Fprintf(c, ` class="%s"`, class)
	}
	if anchor != "" {
		fmt.Fprintf(c, ` text-anchor="%s"`, anchor)
	}
	fmt.Fprintf(c, ">%s</text>\n", html.EscapeString(content))
}

// withUnit formats a value for readers: 429,726 events/s.
func withUnit(value float64, unit string) string {
	whole, fraction, _ := strings.Cut(significant(value), ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if fraction != "" {
		whole += "." + fraction
	}
	switch unit {
	case "1/s":
		return whole + "/s"
	case "us":
		return whole + " µs"
	default:
		return whole + " " + unit
	}
}
