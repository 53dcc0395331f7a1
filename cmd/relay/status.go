package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/config"
	fleet "github.com/diehard-outbox/diehard/pkg/relay/status"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// watchInterval is the time between two looks of `relay status --watch`.
const watchInterval = 2 * time.Second

var errUnhealthy = errors.New("not healthy")

func status() cli.Command[*config.Relay] {
	var watch, asJSON bool
	return cli.Command[*config.Relay]{
		Name:  "status",
		Short: "Show what the fleet of relays does, and what to do",
		Long: "The first line says whether events are delivered, since when not, and why. The command connects\n" +
			"to PostgreSQL only. It exits with 0 if the fleet is healthy, and otherwise with 1, for scripts.\n" +
			"A paused fleet is not healthy.",
		AddFlags: func(flags *pflag.FlagSet) {
			flags.BoolVar(&watch, "watch", false, "repeat every 2 seconds until stopped by a signal")
			flags.BoolVar(&asJSON, "json", false, jsonUsage)
		},
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			return withStore(ctx, p, c, func(s *store.Store) error {
				for {
					now, err := fleet.Read(ctx, s)
					switch {
					case ctx.Err() != nil && watch:
						return nil // a signal has ended the command
					case err != nil && !watch:
						return err
					}
					if watch && !asJSON {
						clearScreen(p.Out)
					}
					switch {
					case err != nil:
						out := p.Out
						if asJSON {
							out = os.Stderr
						}
						err = write(out, "PostgreSQL is not available: %s\n", printable(err.Error()))
					case asJSON:
						err = writeJSON(p.Out, []fleet.Status{now})
					default:
						err = writeStatus(p.Out, &now)
					}
					if err != nil {
						return err
					}
					if !watch {
						if !now.Healthy {
							return cli.ShownError(errUnhealthy)
						}
						return nil
					}
					select {
					case <-ctx.Done():
						return nil
					case <-time.After(watchInterval):
					}
				}
			})
		},
	}
}

// clearScreen clears a terminal. In a file, the looks follow each other.
func clearScreen(w io.Writer) {
	if file, ok := w.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		_, _ = io.WriteString(w, "\x1b[H\x1b[2J")
	}
}

func writeStatus(w io.Writer, s *fleet.Status) error {
	lines := make([]string, 0, 2+len(s.Advice))
	lines = append(lines, printable(s.Verdict))
	for _, advice := range s.Advice {
		lines = append(lines, "- "+printable(advice))
	}
	if s.Runbook != "" {
		lines = append(lines, "See "+s.Runbook+" in docs/runbook.md.")
	}
	if err := write(w, "%s\n\n", strings.Join(lines, "\n")); err != nil {
		return err
	}
	var states []string
	for _, state := range store.BatchStates() {
		states = append(states, fmt.Sprintf("%d %s", s.Batches[state].Batches, strings.ReplaceAll(string(state), "_", " ")))
	}
	letters := fleet.Count(s.DeadLetters)
	if s.DeadLetters >= 10_000 {
		letters += " or more"
	}
	if err := writeRows(w, []string{
		"events\t" + fleet.Count(s.BacklogEvents) + " waiting" + about(s.BacklogBytes) + "; the table has " + fleet.Bytes(s.SizeBytes),
		"batches\t" + strings.Join(states, ", "),
		"dead letters\t" + letters,
	}); err != nil {
		return err
	}
	if len(s.Relays) == 0 {
		return nil
	}
	rows := []string{"", "RELAY\tVERSION\tRUNNING FOR\tLAST REPORT\tEVENTS/S\tWORKERS\tSTATE"}
	for _, relay := range s.Relays {
		silence := time.Duration(relay.SilentSeconds * float64(time.Second))
		state := "ready"
		switch {
		case relay.IsSilent():
			state = "silent"
		case relay.State.Ready != "":
			state = shorten(printable(relay.State.Ready))
		}
		rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s ago\t%.0f\t%d of %d busy\t%s", printable(fleet.Name(relay)), printable(relay.Version),
			fleet.Duration(relay.SeenAt.Sub(relay.StartedAt)+silence), fleet.Duration(silence),
			relay.State.EventsPerSecond, relay.State.Busy, relay.State.Workers, state))
	}
	return writeRows(w, rows)
}

func about(bytes int64) string {
	if bytes == 0 {
		return ""
	}
	return ", about " + fleet.Bytes(bytes)
}

func pause() cli.Command[*config.Relay] {
	return cli.Command[*config.Relay]{
		Name:  "pause",
		Short: "Pause the delivery of the whole fleet",
		Long: "The relays finish the batches that they deliver, and then deliver nothing until `relay resume`.\n" +
			"Publishers are not affected: events wait in the outbox. The pause also holds for relays that\n" +
			"start later.",
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			return withStore(ctx, p, c, func(s *store.Store) error {
				paused, err := s.Pause(ctx, actor())
				if err != nil {
					return err
				}
				if paused {
					return write(p.Out, "paused\n")
				}
				since, err := s.ReadPause(ctx)
				switch {
				case err != nil:
					return err
				case since == nil:
					return write(p.Out, "another operator has resumed the fleet in the meantime\n")
				}
				return write(p.Out, "paused already, since %s by %s\n", since.At.Format(time.RFC3339), printable(since.By))
			})
		},
	}
}

func resume() cli.Command[*config.Relay] {
	return cli.Command[*config.Relay]{
		Name:  "resume",
		Short: "End the pause of the fleet",
		Long:  "The relays continue at once. If the fleet is not paused, the command does nothing.",
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			return withStore(ctx, p, c, func(s *store.Store) error {
				resumed, err := s.Resume(ctx, actor())
				switch {
				case err != nil:
					return err
				case !resumed:
					return write(p.Out, "the fleet is not paused\n")
				}
				return write(p.Out, "resumed\n")
			})
		},
	}
}

// actor names the operator in the audit table: the user of the operating system, and the
// host.
func actor() string {
	name := "unknown"
	if current, err := user.Current(); err == nil {
		name = current.Username
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return name + "@" + host
}
