package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// The program writes the page between these marks. A person writes the rest.
const (
	runBegins = "<!-- The rest of this section is written by make bench/docs. -->\n"
	runEnds   = "<!-- Until here. -->\n"
)

const pageMode = 0o644

// writePage writes the results to a JSON file beside the page, and draws the
// page.
func writePage(path string, r results) error {
	content, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the results: %w", err)
	}
	if err := os.WriteFile(beside(path, ".json"), append(content, '\n'), pageMode); err != nil {
		return fmt.Errorf("write the results: %w", err)
	}
	return drawPage(path)
}

// drawPage writes the page's tables, and the chart beside the page. It reads the
// results that writePage has written.
func drawPage(path string) error {
	content, err := os.ReadFile(beside(path, ".json"))
	if err != nil {
		return fmt.Errorf("read the results: %w", err)
	}
	var r results
	if err := json.Unmarshal(content, &r); err != nil {
		return fmt.Errorf("read the results in %s: %w", beside(path, ".json"), err)
	}
	page, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read the page: %w", err)
	}
	before, rest, begins := bytes.Cut(page, []byte(runBegins))
	_, after, ends := bytes.Cut(rest, []byte(runEnds))
	if !begins || !ends {
		return fmt.Errorf("%s lacks one of the marks around the results", path)
	}
	chart := beside(path, ".svg")
	section := runBegins + tables(r, filepath.Base(chart)) + runEnds
	return errors.Join(
		os.WriteFile(path, bytes.Join([][]byte{before, []byte(section), after}, nil), pageMode),
		os.WriteFile(chart, drawChart(r), pageMode),
	)
}

// beside returns the page's path with another extension.
func beside(page, extension string) string {
	return strings.TrimSuffix(page, filepath.Ext(page)) + extension
}

func tables(r results, chart string) string {
	var out strings.Builder
	fmt.Fprintf(&out, "\n%s.\n\n![Diehard compared with its references: medians and ratios, as in the tables below](%s)\n\n", r.circumstances(), chart)
	out.WriteString("| Figure | Value |\n| --- | ---: |\n")
	for _, figure := range r.Figures {
		fmt.Fprintf(&out, "| `%s` | %s |\n", figure.Name, figure.text())
	}
	out.WriteString("\n| Measured | Median | Lowest | Highest | Unit |\n| --- | ---: | ---: | ---: | --- |\n")
	for _, s := range r.Measured {
		fmt.Fprintf(&out, "| %s | %s | %s | %s | %s |\n", s.Name, significant(s.Median), significant(s.Lowest), significant(s.Highest), s.Unit)
	}
	out.WriteString("\n")
	return out.String()
}

// circumstances returns the environment of the figures in one line.
func (r results) circumstances() string {
	return fmt.Sprintf("%s, %d cores, %s; PostgreSQL %s, ClickHouse %s, %s; %s, %d rounds", r.Machine.CPU, r.Machine.Cores, r.Machine.OS,
		r.Machine.Postgres, r.Machine.ClickHouse, r.Machine.Go, r.At.Format("2006-01-02"), r.Rounds)
}
