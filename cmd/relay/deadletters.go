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
	fleet "github.com/diehard-outbox/diehard/pkg/relay/status"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

func deadLetters() cli.Command[*config.Relay] {
	return cli.Command[*config.Relay]{
		Name:  "dead-letters",
		Short: "List, show, retry or discard events that ClickHouse refused",
		Long: "The relay moves an event that ClickHouse refuses because of its data to the table\n" +
			"outbox_dead_letters, with the error. The event stays there until you retry or discard it.\n" +
			"These commands connect to PostgreSQL only.",
		Commands: []cli.Command[*config.Relay]{
			listDeadLetters(),
			showDeadLetter(),
			changeDeadLetters(change{
				name: "retry", done: "retried", action: store.ActionRequeueDeadLetters,
				short: "Move events back into the outbox for delivery",
				long: "Fix the cause first, such as a constraint of the table. If ClickHouse refuses an event again,\n" +
					"the event becomes a dead letter with a new id. Requeued events keep their event_id and all\n" +
					"other published fields. The relay delivers an event only if it is absent from ClickHouse.\n" +
					"The command ignores dead letters that are added while it runs.",
				change: (*store.Store).RequeueDeadLetters,
			}),
			changeDeadLetters(change{
				name: "discard", done: "discarded", action: store.ActionDiscardDeadLetters,
				short:  "Delete dead letters without delivering them",
				long:   "Discarded events are lost. To keep a copy, run `relay dead-letters show ID --json` first.",
				change: (*store.Store).DiscardDeadLetters,
			}),
			resumeDeadLetters(),
		},
	}
}

func resumeDeadLetters() cli.Command[*config.Relay] {
	return cli.Command[*config.Relay]{
		Name:  "resume",
		Short: "Let events become dead letters again after the fuse has blown",
		Long: "If too many events become dead letters in an hour, the fuse blows: refused events then stay in\n" +
			"the outbox. Correct the cause first. The command mends the fuse for all relays, and the relays\n" +
			"try the refused events again at once. If the fuse has not blown, the command does nothing.",
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			return withStore(ctx, p, c, func(s *store.Store) error {
				mended, err := s.MendFuse(ctx, actor())
				if err != nil {
					return err
				}
				if !mended {
					return write(p.Out, "the fuse has not blown\n")
				}
				return write(p.Out, "fuse mended\n")
			})
		},
	}
}

const (
	jsonUsage    = "print one JSON object per line"
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
			flags.Int64Var(&filter.Before, "before", 0, "only dead letters with an id lower than `ID`, for the next page")
			flags.IntVar(&limit, "limit", defaultLimit, "maximum number of dead letters to list, from 1 to 10000")
			flags.BoolVar(&asJSON, "json", false, jsonUsage)
		}
	)
	return cli.Command[*config.Relay]{
		Name:  "list",
		Short: "List dead letters, newest first",
		Long:  "The list omits payloads; `relay dead-letters show ID` prints them. If more dead letters match\nthan the limit, the last line prints the number of further dead letters.",
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			if limit < 1 || limit > maxLimit {
				return cli.UsageError("--limit is %d, must be from 1 to %d", limit, maxLimit)
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
					err = write(follow, "%d more: list them with --before %d\n", more, letters[limit-1].ID)
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
	rows := []string{"ID\tDEAD-LETTERED AT\tEVENT TYPE\tEVENT ID\tERROR"}
	for _, letter := range letters {
		rows = append(rows, fmt.Sprintf("%d\t%s\t%s\t%s\t%s", letter.ID, letter.DeadLetteredAt.Format(time.RFC3339),
			letter.EventType, letter.EventID, shorten(printable(letter.Error))))
	}
	return writeRows(w, rows)
}

// writeRows writes rows of tab-separated cells in aligned columns.
func writeRows(w io.Writer, rows []string) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if err := write(table, "%s\n", strings.Join(rows, "\n")); err != nil {
		return err
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("write the output: %w", err)
	}
	return nil
}

func showDeadLetter() cli.Command[*config.Relay] {
	var asJSON bool
	return cli.Command[*config.Relay]{
		Name:      "show",
		Arguments: "ID",
		Short:     "Show a dead letter with its payload",
		Long:      "The last line is the payload as it was published. With --json, the payload is a field of the\nobject, without insignificant white space.",
		AddFlags:  func(flags *pflag.FlagSet) { flags.BoolVar(&asJSON, "json", false, jsonUsage) },
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			ids, err := parseIDs(p.Args)
			if err != nil {
				return err
			}
			if len(ids) != 1 {
				return cli.UsageError("show requires one id, got %d", len(ids))
			}
			return withStore(ctx, p, c, func(s *store.Store) error {
				letter, err := s.DeadLetter(ctx, ids[0])
				switch {
				case errors.Is(err, store.ErrNoDeadLetter):
					return notFound(ids[0])
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

// change describes a command that requeues or discards dead letters.
type change struct {
	name, done  string
	action      string // of the audit table
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
		Long: "Select dead letters by id, by filters, or with --all. A dead letter must match all filters.\n" +
			"On a terminal the command asks for confirmation; otherwise it requires --yes. It works in\n" +
			"transactions of 100 dead letters and prints each dead letter after its commit. For more than\n" +
			"100 dead letters, a terminal shows the progress instead.\n\n" + how.long,
		AddFlags: func(flags *pflag.FlagSet) {
			filter.add(flags)
			flags.BoolVar(&all, "all", false, "select all dead letters")
			flags.BoolVar(&yes, "yes", false, "skip the confirmation")
			flags.BoolVar(&asJSON, "json", false, jsonUsage)
		},
		Answer: func(ctx context.Context, p cli.Process, c *config.Relay) error {
			ids, err := parseIDs(p.Args)
			if err != nil {
				return err
			}
			switch byID := len(ids) > 0; {
			case !byID && !filter.given && !all:
				return cli.UsageError("no dead letters selected to %s: pass ids, filters or --all", how.name)
			case byID && filter.given, byID && all, filter.given && all:
				return cli.UsageError("ids, filters and --all are mutually exclusive")
			case !yes && !cli.CanConfirm():
				return cli.UsageError("stdin is not a terminal: add --yes to %s without confirmation", how.name)
			}
			filter.IDs = ids
			return withStore(ctx, p, c, func(s *store.Store) error {
				found, err := s.DeadLetterIDs(ctx, filter.DeadLetterFilter)
				if err != nil {
					return err
				}
				if err := requireAll(ids, found); err != nil {
					return err
				}
				if len(found) > 0 && !yes {
					if err := cli.Confirm(ctx, strings.ToUpper(how.name[:1])+how.name[1:]+" "+number(len(found))+"?"); err != nil {
						return err
					}
				}
				if len(found) > 0 {
					if err := s.AuditDeadLetters(ctx, actor(), how.action, found); err != nil {
						return err
					}
				}
				changed, err := how.apply(ctx, p.Out, s, found, asJSON)
				if err != nil {
					return fmt.Errorf("%s %d of %s; run the command again for the rest: %w",
						how.done, len(changed), number(len(found)), err)
				}
				return requireAll(ids, changed) // another command may have changed some dead letters first
			})
		},
	}
}

// manyDeadLetters is the number of dead letters above which a terminal shows the progress
// of a command, and not each dead letter. It is one transaction.
const manyDeadLetters = 100

// apply changes the dead letters and returns the ids of the changed dead letters.
func (how change) apply(ctx context.Context, w io.Writer, s *store.Store, ids []int64, asJSON bool) ([]int64, error) {
	var progress *cli.Progress
	if len(ids) > manyDeadLetters && !asJSON {
		progress = cli.StartProgress(how.done, len(ids), "dead letters")
	}
	changed, err := how.changeAll(ctx, w, s, ids, asJSON, progress)
	progress.Clear()
	if err != nil || asJSON {
		return changed, err
	}
	gone := ""
	if n := len(ids) - len(changed); n > 0 {
		gone = fmt.Sprintf(", %d no longer found", n)
	}
	return changed, write(w, "%s %s%s\n", number(len(changed)), how.done, gone)
}

// changeAll changes the dead letters and returns the ids of the changed dead letters. It
// writes each of them, unless it has a progress to show.
func (how change) changeAll(ctx context.Context, w io.Writer, s *store.Store, ids []int64, asJSON bool, progress *cli.Progress) ([]int64, error) {
	var changed []int64
	for letters, err := range how.change(s, ctx, ids) {
		if err != nil {
			return changed, err
		}
		for _, letter := range letters {
			changed = append(changed, letter.ID)
		}
		progress.Add(len(letters))
		if progress != nil {
			continue
		}
		if err := how.write(w, letters, asJSON); err != nil {
			return changed, err
		}
	}
	return changed, nil
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

// filterFlags holds the filters of the command line.
type filterFlags struct {
	store.DeadLetterFilter

	given bool // at least one filter is set
}

func (f *filterFlags) add(flags *pflag.FlagSet) {
	add := func(name, usage string, set func(string) error) {
		flags.Func(name, usage, func(value string) error {
			f.given = true
			if value == "" { // an unset variable in a script must not select everything
				return errors.New("must not be empty")
			}
			return set(value)
		})
	}
	text := func(name, usage string, field *string) {
		add(name, usage, func(value string) error { *field = value; return nil })
	}
	at := func(name, usage string, field *time.Time) {
		add(name, usage, func(value string) (err error) { *field, err = fleet.ParseTime(value); return err })
	}
	text("type", "only events of this `TYPE`", &f.EventType)
	text("environment", "only events of this `ENVIRONMENT`", &f.Environment)
	text("error", "only dead letters whose error contains `TEXT`", &f.Error)
	at("since", "only events dead-lettered at or after `TIME`: RFC 3339, or an age such as 24h", &f.Since)
	at("until", "only events dead-lettered before `TIME`", &f.Until)
	add("event-id", "only the event with this `ID`; can be repeated", func(value string) error {
		id, err := uuid.Parse(value)
		f.EventIDs = append(f.EventIDs, id)
		return err //nolint:wrapcheck // the flag's name precedes the error
	})
	add("batch", "only events of the batch with this `ID`", func(value string) (err error) {
		f.BatchID, err = uuid.Parse(value)
		return err //nolint:wrapcheck // the flag's name precedes the error
	})
}

// parseIDs returns nil, an unset filter, if args is empty.
func parseIDs(args []string) ([]int64, error) {
	var ids []int64
	for _, arg := range args {
		id, err := strconv.ParseInt(arg, 10, 64)
		if err != nil || id < 1 {
			return nil, cli.UsageError("invalid id %q: an id is a number, as list shows it", arg)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// requireAll returns an error that names the first id missing from found.
func requireAll(ids, found []int64) error {
	for _, id := range ids {
		if !slices.Contains(found, id) {
			return notFound(id)
		}
	}
	return nil
}

func notFound(id int64) error { return fmt.Errorf("dead letter %d not found", id) }

// withStore opens the store, checks its schema and calls do.
func withStore(ctx context.Context, p cli.Process, c *config.Relay, do func(*store.Store) error) error {
	db, err := postgres.Open(postgres.Options{
		DSN:             c.Postgres.DSN,
		PasswordFile:    c.Postgres.PasswordFile,
		MaxOpenConns:    1,
		ApplicationName: "diehard-operator",
		Session:         store.Session(c.Relay.FlushTimeout),
		Log:             p.Log,
	})
	if err != nil {
		return err
	}
	defer db.Close()
	if err := schema(c).Check(ctx, db.DB, p.Log); err != nil {
		return err
	}
	return do(store.New(db, storeOptions(c)))
}

func write(w io.Writer, format string, args ...any) error {
	if _, err := fmt.Fprintf(w, format, args...); err != nil {
		return fmt.Errorf("write the output: %w", err)
	}
	return nil
}

func writeJSON[T any](w io.Writer, values []T) error {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	for _, value := range values {
		if err := encoder.Encode(value); err != nil {
			return fmt.Errorf("write the output: %w", err)
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

// printable replaces unprintable characters by spaces. The text can come from an
// event, and must not contain line breaks or terminal escape sequences.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
}

// shorten limits the length of a cell.
func shorten(text string) string {
	const most = 160 // enough to include the name of a violated constraint
	runes := []rune(text)
	if len(runes) <= most {
		return text
	}
	return string(runes[:most-1]) + "…"
}
