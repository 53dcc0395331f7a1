package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/term"
)

// CanConfirm reports whether stdin is a terminal.
func CanConfirm() bool { return term.IsTerminal(int(os.Stdin.Fd())) }

var errNotConfirmed = errors.New("not confirmed: nothing was changed")

// Confirm asks the question on the terminal. It returns an error unless the answer
// is y or yes.
func Confirm(ctx context.Context, question string) error {
	// The question goes to stderr because stdout can be redirected to a file.
	if _, err := fmt.Fprintf(os.Stderr, "%s [y/N] ", question); err != nil {
		return fmt.Errorf("ask to confirm: %w", err)
	}
	// A signal does not interrupt the read, so a goroutine reads.
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(os.Stdin).ReadString('\n') // the end of the input counts as no
		answer <- line
	}()
	select {
	case line := <-answer:
		switch strings.ToLower(strings.TrimSpace(line)) {
		case "y", "yes":
			return nil
		}
	case <-ctx.Done():
		fmt.Fprintln(os.Stderr)
	}
	return errNotConfirmed
}
