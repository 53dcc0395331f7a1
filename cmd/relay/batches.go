package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/pflag"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/config"
	fleet "github.com/diehard-outbox/diehard/pkg/relay/status"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

func batches() cli.Command[*config.Relay] {
	return cli.Command[*config.Relay]{
		Name:  "batches",
		Short: "List, show, retry or split the batches that wait",
		Long: "A batch contains the events of one insert. Relays delete a batch when it is delivered.\n" +
			"These commands connect to PostgreSQL only.",
		Commands: []cli.Command[*config.Relay]{
			listBatches(),
			showBatch(),
			changeBatch("retry", "retried", "Attempt batches at once",
				"A failing batch, or a batch that is put off, does not wait for its next attempt. The relay\n"+
					"resolves the earlier attempts first, as always.", (*store.Store).RetryBatch),
			changeBatch("split", "marked for a split", "Deliver the events of batches in smaller parts",
				"The relay takes the data of the batch for the cause of its failures: it resolves the earlier\n"+
					"attempts, inserts a sample of the events, and puts the others into new batches. The command\n"+
					"refuses a batch that was not attempted, or that has one event.", (*store.Store).SplitBatch),
		},
	}
}

func listBatches() cli.Command[*config.Relay] {
	var (
		state  string
		limit  int
		asJSON bool
	)
	states := make([]string, 0, len(store.BatchStates()))
	for _, known := range store.BatchStates() {
		states = append(states, string(known))
	}
	return cli.Command[*config.Relay]{
		Name:  "list",
		Short: "List the batches that wait, oldest first",
		Long: "The states are: waiting, any worker can claim the batch; in_flight, a worker attempts it; failing,\n" +
			"an attempt has failed, and the data may be the cause; put_off, the next attempt is not due yet.",
		AddFlags: func(flags *pflag.FlagSet) {
			flags.StringVar(&state, "state", "", "only batches in this `STATE`: "+strings.Join(states, ", "))
			flags.IntVar(&limit, "limit", defaultLimit, "maximum number of batches to list, from 1 to 10000")
			flags.BoolVar(&asJSON, "json", false, jsonUsage)
		},
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			switch {
			case state != "" && !slices.Contains(states, state):
				return cli.UsageError("--state is %q, must be one of %s", state, strings.Join(states, ", "))
			case limit < 1 || limit > maxLimit:
				return cli.UsageError("--limit is %d, must be from 1 to %d", limit, maxLimit)
			}
			return withStore(ctx, p, c, func(s *store.Store) error {
				// One more batch shows whether there are more.
				listed, err := s.Batches(ctx, store.BatchState(state), limit+1)
				if err != nil {
					return err
				}
				more := len(listed) > limit
				listed = listed[:min(limit, len(listed))]
				follow := p.Out
				if asJSON {
					follow = os.Stderr
					err = writeJSON(p.Out, listed)
				} else {
					err = writeBatches(p.Out, listed)
				}
				if err == nil && more {
					err = write(follow, "more batches wait: raise --limit\n")
				}
				return err
			})
		},
	}
}

func writeBatches(w io.Writer, listed []store.BatchInfo) error {
	if len(listed) == 0 {
		return write(w, "no batches\n")
	}
	rows := []string{"BATCH ID\tSTATE\tEVENTS\tSIZE\tAGE\tATTEMPTS\tNEXT ATTEMPT\tLAST ERROR"}
	for _, b := range listed {
		rows = append(rows, fmt.Sprintf("%s\t%s\t%d\t%s\t%s\t%d\t%s\t%s", b.ID, b.State, b.Events, fleet.Bytes(b.Bytes),
			fleet.Duration(time.Since(b.CreatedAt)), b.Attempts, next(b), cmp.Or(shorten(printable(b.LastError)), "-")))
	}
	return writeRows(w, rows)
}

// next returns when a batch is due.
func next(b store.BatchInfo) string {
	switch {
	case b.State == store.InFlight:
		return "now"
	case b.NextAttemptAt == nil:
		return "due"
	}
	return "in " + fleet.Duration(max(0, time.Until(*b.NextAttemptAt)))
}

func showBatch() cli.Command[*config.Relay] {
	var asJSON bool
	return cli.Command[*config.Relay]{
		Name:      "show",
		Arguments: "ID",
		Short:     "Show a batch",
		Long:      "event_ids are ranges of ids of the table outbox_events.",
		AddFlags:  func(flags *pflag.FlagSet) { flags.BoolVar(&asJSON, "json", false, jsonUsage) },
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			ids, err := parseBatchIDs("show", p.Args)
			if err != nil {
				return err
			}
			if len(ids) != 1 {
				return cli.UsageError("show requires one id, got %d", len(ids))
			}
			return withStore(ctx, p, c, func(s *store.Store) error {
				b, err := s.Batch(ctx, ids[0])
				switch {
				case errors.Is(err, store.ErrNoBatch):
					return batchNotFound(ids[0])
				case err != nil:
					return err
				case asJSON:
					return writeJSON(p.Out, []store.BatchInfo{b})
				}
				return writeBatch(p.Out, &b)
			})
		},
	}
}

func writeBatch(w io.Writer, b *store.BatchInfo) error {
	at := func(t *time.Time) string {
		if t == nil {
			return "-"
		}
		return t.Format(time.RFC3339Nano)
	}
	rows := []string{
		"batch_id\t" + b.ID.String(),
		"state\t" + string(b.State),
		fmt.Sprint("events\t", b.Events),
		fmt.Sprint("bytes\t", b.Bytes),
		fmt.Sprint("attempts\t", b.Attempts),
		fmt.Sprint("failures\t", b.Failures),
		fmt.Sprint("quarantined\t", b.Quarantined),
		"token\t" + printable(b.Token),
		"created_at\t" + b.CreatedAt.Format(time.RFC3339Nano),
		"last_attempt_at\t" + at(b.LastAttemptAt),
		"next_attempt_at\t" + at(b.NextAttemptAt),
		"last_error\t" + cmp.Or(printable(b.LastError), "-"),
		"destination\t" + cmp.Or(printable(b.Destination), "-"),
		"event_ids\t" + shorten(b.EventIDs),
	}
	return writeRows(w, rows)
}

// changeBatch returns a command that changes batches by their ids.
func changeBatch(name, done, short, long string, change func(*store.Store, context.Context, string, uuid.UUID) error) cli.Command[*config.Relay] {
	return cli.Command[*config.Relay]{
		Name:      name,
		Arguments: "ID...",
		Short:     short,
		Long:      long,
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			ids, err := parseBatchIDs(name, p.Args)
			if err != nil {
				return err
			}
			return withStore(ctx, p, c, func(s *store.Store) error {
				for _, id := range ids {
					switch err := change(s, ctx, actor(), id); {
					case errors.Is(err, store.ErrNoBatch):
						return batchNotFound(id)
					case err != nil:
						return fmt.Errorf("batch %s: %w", id, err)
					}
					if err := write(p.Out, "%s %s\n", done, id); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

func parseBatchIDs(command string, args []string) (ids []uuid.UUID, err error) {
	if len(args) == 0 {
		return nil, cli.UsageError("%s requires an id, as list shows it", command)
	}
	for _, arg := range args {
		id, err := uuid.Parse(arg)
		if err != nil {
			return nil, cli.UsageError("invalid id %q: an id is a UUID, as list shows it", arg)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

func batchNotFound(id uuid.UUID) error {
	return fmt.Errorf("batch %s not found: it may have been delivered", id)
}
