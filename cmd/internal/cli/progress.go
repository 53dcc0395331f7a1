package cli

import (
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"golang.org/x/term"
)

// clearLine moves the cursor to the start of its line and clears the line.
const clearLine = "\r\x1b[K"

// Progress is one line of the terminal. The line says how much of a long task is done. A
// nil *Progress shows nothing.
type Progress struct {
	out   io.Writer
	width func() int // columns of the terminal
	verb  string
	unit  string
	total int
	done  int
	start time.Time
}

// StartProgress shows the progress of a task on stderr, such as "retried 0 of 5000 dead
// letters". The caller calls Clear before any other output. StartProgress returns nil
// unless stdout and stderr are terminals that can clear a line.
func StartProgress(verb string, total int, unit string) *Progress {
	stderr := int(os.Stderr.Fd())
	if !term.IsTerminal(int(os.Stdout.Fd())) || !term.IsTerminal(stderr) || os.Getenv("TERM") == "dumb" {
		return nil
	}
	p := &Progress{
		out: os.Stderr, verb: verb, total: total, unit: unit, start: time.Now(),
		width: func() int { width, _, _ := term.GetSize(stderr); return width }, // 0 if it is unknown
	}
	p.Add(0)
	return p
}

// Add counts n more parts of the task as done.
func (p *Progress) Add(n int) {
	if p == nil {
		return
	}
	p.done += n
	line := p.text(time.Since(p.start))
	// A line that wraps cannot be cleared.
	if width := p.width(); width > 0 && len(line) >= width {
		line = line[:width-1]
	}
	_, _ = io.WriteString(p.out, clearLine+line) // the task is more important than its progress
}

// Clear removes the line.
func (p *Progress) Clear() {
	if p != nil {
		_, _ = io.WriteString(p.out, clearLine)
	}
}

// text returns the line after the time that the task has taken so far.
func (p *Progress) text(took time.Duration) string {
	text := fmt.Sprintf("%s %d of %d %s", p.verb, p.done, p.total, p.unit)
	if p.done == 0 || took <= 0 {
		return text
	}
	left := math.Ceil(took.Seconds() / float64(p.done) * float64(p.total-p.done))
	return fmt.Sprintf("%s, %.0f/s, %s left", text, float64(p.done)/took.Seconds(), time.Duration(left)*time.Second)
}
