package main

import (
	"bytes"
	"fmt"
	"html"
	"os"
	"path/filepath"
	"strings"
)

// The page has the run's own between these lines; the rest is written by hand.
const (
	runBegins = "<!-- The rest of this section is written by make bench/docs. -->\n"
	runEnds   = "<!-- Until here. -->\n"
)

// writePage puts the results into the page, and the chart beside it.
func writePage(path string, r results) error {
	page, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read the page: %w", err)
	}
	before, rest, begins := bytes.Cut(page, []byte(runBegins))
	_, after, ends := bytes.Cut(rest, []byte(runEnds))
	if !begins || !ends {
		return fmt.Errorf("%s lacks one of the lines between which the results go", path)
	}
	const chart = "benchmarks.svg"
	var out bytes.Buffer
	out.Write(before)
	out.WriteString(runBegins)
	fmt.Fprintf(&out, "\n%s, %d cores, %s; PostgreSQL %s, ClickHouse %s, %s; %s, %d rounds.\n\n", r.Machine.CPU, r.Machine.Cores,
		r.Machine.OS, r.Machine.Postgres, r.Machine.ClickHouse, r.Machine.Go, r.At.Format("2006-01-02"), r.Rounds)
	out.WriteString("| Figure | Value |\n| --- | ---: |\n")
	for _, figure := range r.Figures {
		fmt.Fprintf(&out, "| `%s` | %s |\n", figure.Name, figure.text())
	}
	fmt.Fprintf(&out, "\n![What was measured, in each of the rounds](%s)\n\n", chart)
	out.WriteString("| Measured | Median | Lowest | Highest | Unit |\n| --- | ---: | ---: | ---: | --- |\n")
	for _, s := range r.Measured {
		fmt.Fprintf(&out, "| %s | %s | %s | %s | %s |\n", strings.TrimSpace(s.Name), significant(s.median()),
			significant(percentile(s.Values, 0)), significant(percentile(s.Values, 1)), s.Unit)
	}
	out.WriteString("\n" + runEnds)
	out.Write(after)
	const mode = 0o644
	if err := os.WriteFile(path, out.Bytes(), mode); err != nil {
		return fmt.Errorf("write the page: %w", err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), chart), drawChart(r.Measured), mode); err != nil {
		return fmt.Errorf("write the chart: %w", err)
	}
	return nil
}

// The chart's measures, in pixels.
const (
	chartWidth = 900
	textWidth  = 380
	barWidth   = 400
	rowHeight  = 22
	headHeight = 34
	margin     = 12
)

// drawChart draws the rates, as those have one scale: for each a bar as long as
// its median, and a dot for each round.
func drawChart(measured []series) []byte {
	var svg bytes.Buffer
	var rows []series
	for _, s := range measured {
		if strings.HasSuffix(s.Unit, "/s") && s.Unit != "MB/s" {
			rows = append(rows, s)
		}
	}
	byUnit := make(map[string]float64) // the longest bar of each unit
	for _, s := range rows {
		byUnit[s.Unit] = max(byUnit[s.Unit], percentile(s.Values, 1))
	}
	height := headHeight + rowHeight*len(rows) + margin
	fmt.Fprintf(&svg, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n",
		chartWidth, height, chartWidth, height)
	fmt.Fprintf(&svg, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", chartWidth, height)
	fmt.Fprintf(&svg, `<text x="%d" y="20" font-size="14" fill="#1f2328">Rates: bars are medians, dots are rounds; each unit has a scale of its own</text>`+"\n", margin)
	for i, s := range rows {
		y := headHeight + rowHeight*i
		length := func(value float64) float64 { return value / byUnit[s.Unit] * barWidth }
		fmt.Fprintf(&svg, `<text x="%d" y="%d" text-anchor="end" fill="#1f2328">%s</text>`+"\n", textWidth-margin, y+15, html.EscapeString(strings.TrimSpace(s.Name)))
		fmt.Fprintf(&svg, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="#6ea8fe"/>`+"\n", textWidth, y+4, length(s.median()), rowHeight-8)
		for _, value := range s.Values {
			fmt.Fprintf(&svg, `<circle cx="%.1f" cy="%d" r="2.5" fill="#1f2328" fill-opacity="0.6"/>`+"\n", textWidth+length(value), y+rowHeight/2)
		}
		fmt.Fprintf(&svg, `<text x="%.1f" y="%d" fill="#59636e">%s %s</text>`+"\n", textWidth+length(percentile(s.Values, 1))+8, y+15, significant(s.median()), s.Unit)
	}
	svg.WriteString("</svg>\n")
	return svg.Bytes()
}
