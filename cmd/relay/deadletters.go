package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/google/uuid"
	"github.com/spf13/pflag"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

func deadLetters() cli.Command[*config.Relay] {
	return cli.Command[*config.Relay]{
		Name:  "dead-letters",
		Short: "List, show, retry or discard the events that ClickHouse could not take",
		Long: "An event that is refused for its data is moved to the table outbox_dead_letters with\n" +
			"the error, and the others go on. There it stays until it is retried or discarded.\n" +
			"These commands need PostgreSQL only.",
		Commands: []cli.Command[*config.Relay]{
			listDeadLetters(),
			showDeadLetter(),
			changeDeadLetters(change{
				name: "retry", done: "retried",
				short: "Put events back into the outbox, to be delivered again",
				long: "Mend the cause first, such as a constraint of the table: what ClickHouse still refuses\n" +
					"becomes a dead letter again, with a new id. An event keeps its event_id and everything\n" +
					"else that was published. Letters that die after the command has looked are not touched.",
				change: (*store.Store).RequeueDeadLetters,
			}),
			changeDeadLetters(change{
				name: "discard", done: "discarded",
				short:  "Delete events that shall never be delivered",
				long:   "What is discarded is lost. `relay dead-letters show ID --json` keeps a copy.",
				change: (*store.Store).DiscardDeadLetters,
			}),
		},
	}
}

const (
	jsonUsage    = "one JSON object a line"
	defaultLimit = 50
	maxLimit     = 10_000
)

func listDeadLetters() cli.Command[*config.Relay] {
	var (
		filter   filterFlags
		limit    int
		asJSON   bool
		addFlags = func(flags *pflag.FlagSet) {
			filter.add(flags)
			flags.Int64Var(&filter.Before, "before", 0, "only those with a lower `ID`: the next page")
			flags.IntVar(&limit, "limit", defaultLimit, "most that are listed, up to 10000")
			flags.BoolVar(&asJSON, "json", false, jsonUsage)
		}
	)
	return cli.Command[*config.Relay]{
		Name:  "list",
		Short: "List dead letters, the newest first",
		Long:  "Payloads are not listed: `relay dead-letters show ID` has them. Where more letters match than\nare listed, it says how many.",
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			if limit < 1 || limit > maxLimit {
				return cli.UsageError("--limit is %d, and has to be from 1 to %d", limit, maxLimit)
			}
			return withStore(ctx, p, c, func(s *store.Store) error {
				letters, more, err := s.DeadLetters(ctx, filter.DeadLetterFilter, limit)
				if err != nil {
					return err
				}
				follow := p.Out
				if asJSON {
					follow = os.Stderr
					err = writeJSON(p.Out, letters)
				} else {
					err = writeTable(p.Out, letters)
				}
				if err == nil && more > 0 {
					err = write(follow, "%d more: --before %d lists the next\n", more, letters[limit-1].ID)
				}
				return err
			})
		},
		AddFlags: addFlags,
	}
}

func writeTable(w io.Writer, letters []store.DeadLetter) error {
	if len(letters) == 0 {
		return write(w, "no dead letters\n")
	}
	rows := []string{"ID\tDIED AT\tEVENT TYPE\tEVENT ID\tERROR"}
	for _, letter := range letters {
		rows = append(rows, fmt.Sprintf("%d\t%s\t%s\t%s\t%s", letter.ID, letter.DeadLetteredAt.Format(time.RFC3339),
			letter.EventType, letter.EventID, shorten(printable(letter.Error))))
	}
	return writeRows(w, rows)
}

// writeRows writes rows, whose cells are followed by tabs, in columns.
func writeRows(w io.Writer, rows []string) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if err := write(table, "%s\n", strings.Join(rows, "\n")); err != nil {
		return err
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	return nil
}

func showDeadLetter() cli.Command[*config.Relay] {
	var asJSON bool
	return cli.Command[*config.Relay]{
		Name:      "show",
		Arguments: "ID",
		Short:     "Show a dead letter with its payload",
		Long:      "The payload is the last line, as it was published. With --json it is a part of the object,\nwithout the space between its values.",
		AddFlags:  func(flags *pflag.FlagSet) { flags.BoolVar(&asJSON, "json", false, jsonUsage) },
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			ids, err := parseIDs(p.Args)
			if err != nil {
				return err
			}
			if len(ids) != 1 {
				return cli.UsageError("show takes one id, and got %d", len(ids))
			}
			return withStore(ctx, p, c, func(s *store.Store) error {
				letter, err := s.DeadLetter(ctx, ids[0])
				switch {
				case errors.Is(err, store.ErrNoDeadLetter):
					return notThere(ids[0])
				case err != nil:
					return err
				case asJSON:
					return writeJSON(p.Out, []store.DeadLetter{letter})
				}
				return writeLetter(p.Out, letter)
			})
		},
	}
}

func writeLetter(w io.Writer, letter store.DeadLetter) error {
	err := writeRows(w, []string{
		fmt.Sprint("id\t", letter.ID),
		"dead_lettered_at\t" + letter.DeadLetteredAt.Format(time.RFC3339Nano),
		"error\t" + printable(letter.Error),
		"batch_id\t" + letter.BatchID.String(),
		fmt.Sprint("outbox_event_id\t", letter.OutboxEventID),
		"event_id\t" + letter.EventID.String(),
		"event_type\t" + letter.EventType,
		"event_date_time\t" + letter.EventDateTime.Format(time.RFC3339Nano),
		"environment\t" + printable(letter.Environment),
		fmt.Sprint("metadata_version\t", letter.MetadataVersion),
		"traceparent\t" + printable(cmp.Or(letter.Traceparent, "-")),
		"published_at\t" + letter.PublishedAt.Format(time.RFC3339Nano),
		fmt.Sprintf("event_context\t%d bytes:", len(letter.EventContext)),
	})
	if err != nil {
		return err
	}
	return write(w, "%s\n", letter.EventContext)
}

// change is what is done to dead letters for good.
type change struct {
	name, done  string
	short, long string
	change      func(*store.Store, context.Context, []int64) iter.Seq2[[]store.DeadLetterKey, error]
}

func changeDeadLetters(how change) cli.Command[*config.Relay] {
	var (
		filter           filterFlags
		all, yes, asJSON bool
	)
	return cli.Command[*config.Relay]{
		Name:      how.name,
		Arguments: "[ID...]",
		Short:     how.short,
		Long: "Which ones is said by their ids, by filters, all of which have to fit, or by --all.\n" +
			"On a terminal it asks first; elsewhere it needs --yes. It goes on in steps of 100 and prints\n" +
			"each letter as soon as that is " + how.done + ".\n\n" + how.long,
		AddFlags: func(flags *pflag.FlagSet) {
			filter.add(flags)
			flags.BoolVar(&all, "all", false, "all dead letters")
			flags.BoolVar(&yes, "yes", false, "do not ask")
			flags.BoolVar(&asJSON, "json", false, jsonUsage)
		},
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			ids, err := parseIDs(p.Args)
			if err != nil {
				return err
			}
			switch byID := len(ids) > 0; {
			case !byID && !filter.given && !all:
				return cli.UsageError("%s which dead letters? Give ids, filters or --all", how.name)
			case byID && filter.given, byID && all, filter.given && all:
				return cli.UsageError("ids, filters and --all exclude each other")
			case !yes && !cli.CanConfirm():
				return cli.UsageError("stdin is no terminal to confirm on: add --yes to %s without being asked", how.name)
			}
			filter.IDs = ids
			return withStore(ctx, p, c, func(s *store.Store) error {
				found, err := s.DeadLetterIDs(ctx, filter.DeadLetterFilter)
				if err != nil {
					return err
				}
				if err := allThere(ids, found); err != nil {
					return err
				}
				if len(found) > 0 && !yes {
					if err := cli.Confirm(ctx, strings.ToUpper(how.name[:1])+how.name[1:]+" "+number(len(found))+"?"); err != nil {
						return err
					}
				}
				changed, err := how.apply(ctx, p.Out, s, found, asJSON)
				if err != nil {
					return fmt.Errorf("%s %d of %s; run it again for the rest: %w",
						how.done, len(changed), number(len(found)), err)
				}
				return allThere(ids, changed) // somebody else may have been faster
			})
		},
	}
}

// apply changes the letters, and returns the ids of those that were.
func (how change) apply(ctx context.Context, w io.Writer, s *store.Store, ids []int64, asJSON bool) ([]int64, error) {
	var changed []int64
	for letters, err := range how.change(s, ctx, ids) {
		if err != nil {
			return changed, err
		}
		for _, letter := range letters {
			changed = append(changed, letter.ID)
		}
		if err := how.write(w, letters, asJSON); err != nil {
			return changed, err
		}
	}
	if asJSON {
		return changed, nil
	}
	gone := ""
	if n := len(ids) - len(changed); n > 0 {
		gone = fmt.Sprintf(", %d were gone meanwhile", n)
	}
	return changed, write(w, "%s %s%s\n", number(len(changed)), how.done, gone)
}

func (how change) write(w io.Writer, letters []store.DeadLetterKey, asJSON bool) error {
	if !asJSON {
		for _, letter := range letters {
			if err := write(w, "%s %d  %s  %s\n", how.done, letter.ID, letter.EventType, letter.EventID); err != nil {
				return err
			}
		}
		return nil
	}
	type result struct {
		store.DeadLetterKey

		Result string `json:"result"`
	}
	results := make([]result, len(letters))
	for i, letter := range letters {
		results[i] = result{letter, how.done}
	}
	return writeJSON(w, results)
}

// filterFlags are the filters of the command line.
type filterFlags struct {
	store.DeadLetterFilter

	given bool // any of them
}

func (f *filterFlags) add(flags *pflag.FlagSet) {
	add := func(name, usage string, set func(string) error) {
		flags.Func(name, usage, func(value string) error {
			f.given = true
			if value == "" { // an unset variable of a script must not select everything
				return errors.New("it is empty")
			}
			return set(value)
		})
	}
	text := func(name, usage string, field *string) {
		add(name, usage, func(value string) error { *field = value; return nil })
	}
	at := func(name, usage string, field *time.Time) {
		add(name, usage, func(value string) (err error) { *field, err = parseTime(value); return err })
	}
	text("type", "only those of this event `TYPE`", &f.EventType)
	text("environment", "only those of this `ENVIRONMENT`", &f.Environment)
	text("error", "only those whose error has this `TEXT` in it", &f.Error)
	at("since", "only those that died at this `TIME` or later: RFC 3339, or how long ago, such as 24h", &f.Since)
	at("until", "only those that died before this `TIME`", &f.Until)
	add("event-id", "only that of this event `ID`; may be repeated", func(value string) error {
		id, err := uuid.Parse(value)
		f.EventIDs = append(f.EventIDs, id)
		return err //nolint:wrapcheck // it follows the flag's name
	})
	add("batch", "only those of the batch with this `ID`", func(value string) (err error) {
		f.BatchID, err = uuid.Parse(value)
		return err //nolint:wrapcheck // it follows the flag's name
	})
}

func parseTime(value string) (time.Time, error) {
	if at, err := time.Parse(time.RFC3339, value); err == nil {
		return at, nil
	}
	ago, err := time.ParseDuration(value)
	if err != nil || ago < 0 {
		return time.Time{}, errors.New("it is neither a time such as 2026-11-24T03:00:00Z nor how long ago, such as 24h")
	}
	return time.Now().Add(-ago), nil
}

// parseIDs returns nil, which is a filter that is not set, where there are none.
func parseIDs(args []string) ([]int64, error) {
	var ids []int64
	for _, arg := range args {
		id, err := strconv.ParseInt(arg, 10, 64)
		if err != nil || id < 1 {
			return nil, cli.UsageError("%q is no dead letter's id: that is a number, as list shows it", arg)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// allThere returns an error that names the first of the ids that is not among
// those there.
func allThere(ids, there []int64) error {
	for _, id := range ids {
		if !slices.Contains(there, id) {
			return notThere(id)
		}
	}
	return nil
}

func notThere(id int64) error { return fmt.Errorf("there is no dead letter %d", id) }

// withStore does something with a store whose schema is not too old.
func withStore(ctx context.Context, p cli.Process, c *config.Relay, do func(*store.Store) error) error {
	db, err := postgres.Open(postgres.Options{
		DSN:             c.Postgres.DSN,
		MaxOpenConns:    1,
		ApplicationName: "diehard-dead-letters",
		Session:         store.Session(c.Relay.FlushTimeout),
	})
	if err != nil {
		return err
	}
	defer db.Close()
	if err := schema(c).Check(ctx, db.DB, p.Log); err != nil {
		return err
	}
	return do(store.New(db, store.Options{Schema: c.Postgres.Schema}))
}

func write(w io.Writer, format string, args ...any) error {
	if _, err := fmt.Fprintf(w, format, args...); err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	return nil
}

func writeJSON[T any](w io.Writer, values []T) error {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	for _, value := range values {
		if err := encoder.Encode(value); err != nil {
			return fmt.Errorf("write the answer: %w", err)
		}
	}
	return nil
}

func number(letters int) string {
	if letters == 1 {
		return "1 dead letter"
	}
	return fmt.Sprintf("%d dead letters", letters)
}

// printable keeps a text from breaking its line, and from steering the
// terminal: it may be of the event's making.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
}

// shorten makes a text fit into a table.
func shorten(text string) string {
	const most = 160 // the name of a constraint is within
	runes := []rune(text)
	if len(runes) <= most {
		return text
	}
	return string(runes[:most-1]) + "…"
}
