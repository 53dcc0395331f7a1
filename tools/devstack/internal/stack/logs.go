package stack

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/terminal"
)

// colours holds the ANSI escape sequence of each program.
var colours = map[string]string{"api": "\x1b[36m", "relay": "\x1b[35m", "migrate": "\x1b[33m"}

// TerminalLogs writes the programs' logs to out line by line. Each line begins
// with the name of its program, in colour if out is a terminal.
func TerminalLogs(out io.Writer) Logs {
	var mu sync.Mutex
	// https://no-color.org
	coloured := terminal.Is(out) && os.Getenv("NO_COLOR") == ""
	return func(name string) io.Writer {
		prefix := fmt.Sprintf("%-7s | ", name)
		if coloured {
			prefix = colours[name] + prefix + "\x1b[0m"
		}
		return &prefixer{mu: &mu, out: out, prefix: prefix}
	}
}

// prefixer writes only whole lines, so that lines of several programs do not
// mix.
type prefixer struct {
	mu     *sync.Mutex // shared by all writers to out
	out    io.Writer
	prefix string
	rest   []byte // the incomplete line
}

func (p *prefixer) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rest = append(p.rest, b...)
	for {
		line, rest, ok := bytes.Cut(p.rest, []byte("\n"))
		if !ok {
			return len(b), nil
		}
		if _, err := fmt.Fprintf(p.out, "%s%s\n", p.prefix, line); err != nil {
			return 0, err //nolint:wrapcheck // the writer's own error
		}
		p.rest = rest
	}
}

// FileLogs writes the log of each program to a file of its own. It empties the file
// first.
func FileLogs(dir string) Logs {
	files := map[string]io.Writer{}
	return func(name string) io.Writer {
		if file := files[name]; file != nil { // both programs migrate, and share this log
			return file
		}
		file, err := os.Create(dir + "/" + name + ".log")
		if err != nil {
			return io.Discard // unlikely, because the folder is new; the end of the log is also in memory
		}
		files[name] = file
		return file
	}
}
