// Package terminal tells whether a person watches.
package terminal

import (
	"io"
	"os"

	"golang.org/x/term"
)

// Is says whether what is written to w appears on a terminal.
func Is(w io.Writer) bool {
	file, ok := w.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}
