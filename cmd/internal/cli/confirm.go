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

// CanConfirm tells whether somebody is there to be asked.
func CanConfirm() bool { return term.IsTerminal(int(os.Stdin.Fd())) }

var errNotConfirmed = errors.New("not confirmed: nothing was changed")

// Confirm asks on the terminal, and returns an error unless the answer is yes.
func Confirm(ctx context.Context, question string) error {
	// Not on stdout, which may be a file.
	if _, err := fmt.Fprintf(os.Stderr, "%s [y/N] ", question); err != nil {
		return fmt.Errorf("ask to confirm: %w", err)
	}
	// A signal does not end the reading, so nothing waits for it then.
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(os.Stdin).ReadString('\n') // its end is a no
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
