// Package terminal detects terminals.
package terminal

import (
	"io"
	"os"

	"golang.org/x/term"
)

// Is reports whether w writes to a terminal.
func Is(w io.Writer) bool {
	file, ok := w.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}
