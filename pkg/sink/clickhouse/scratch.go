package clickhouse

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/conformance"
)

// Scratch is a table for the cases of package conformance, beside the event log. The
// migrations create it, so it has the same definition as a new event log.
type Scratch struct {
	o      Options
	sink   *Sink
	others []*Sink
}

// scratchName matches the names of scratch tables, so that Drop cannot drop another table.
var scratchName = regexp.MustCompile(`_check_[a-z0-9]{8}$`)

// OpenScratch returns a scratch table with a new name, <table>_check_<random>. It creates
// nothing.
func OpenScratch(o Options) (*Scratch, error) {
	o.Table = cmp.Or(o.Table, DefaultTable) + "_check_" + strings.ToLower(rand.Text()[:8])
	first, err := Open(o)
	if err != nil {
		return nil, err
	}
	s := &Scratch{o: o, sink: first}
	for _, address := range first.addresses {
		host := o
		host.host = address
		other, err := Open(host)
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		s.others = append(s.others, other)
	}
	return s, nil
}

// Tables returns the names of the tables that Create creates.
func (s *Scratch) Tables() []string { return []string{s.o.Table, s.o.Table + versionTableSuffix} }

// Create creates the tables.
func (s *Scratch) Create(ctx context.Context) error {
	if err := Migrate(ctx, s.o, slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	// Without this setting, a merge could remove duplicates before Stored counts them.
	return s.alter(ctx, "MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1, max_bytes_to_merge_at_min_space_in_pool = 1")
}

// Drop drops the tables. It can be repeated.
func (s *Scratch) Drop(ctx context.Context) (err error) {
	if !scratchName.MatchString(s.o.Table) {
		return fmt.Errorf("%s is not a scratch table", s.o.Table)
	}
	for _, statement := range s.DropStatements() {
		err = errors.Join(err, s.exec(ctx, statement))
	}
	return err
}

// DropStatements returns the statements of Drop.
func (s *Scratch) DropStatements() []string {
	tables := s.Tables()
	statements := make([]string, len(tables))
	for i, table := range tables {
		statements[i] = "DROP TABLE IF EXISTS " + quoteIdentifier(table) + onCluster(s.o.Cluster)
	}
	return statements
}

// Close closes the connections.
func (s *Scratch) Close() error {
	err := s.sink.Close()
	for _, other := range s.others {
		err = errors.Join(err, other.Close())
	}
	return err
}

// Harness returns the harness for the cases. patience limits each wait.
func (s *Scratch) Harness(patience time.Duration) conformance.Harness {
	others := make([]sink.Sink, len(s.others))
	for i, other := range s.others {
		others[i] = other
	}
	return conformance.Harness{
		Sink:     s.sink,
		Others:   others,
		Stored:   s.stored,
		Slow:     s.slow,
		Refuse:   s.refuse,
		Window:   LeastWindow,
		Patience: patience,
	}
}

func (s *Scratch) slow(ctx context.Context, d time.Duration) (conformance.Restore, error) {
	return s.constrain(ctx, fmt.Sprintf("sleep(%g) = 0", d.Seconds()))
}

func (s *Scratch) refuse(ctx context.Context, eventType string) (conformance.Restore, error) {
	return s.constrain(ctx, "event_type != "+quoteString(eventType))
}

// constrain adds a constraint, which ClickHouse evaluates during each insert.
func (s *Scratch) constrain(ctx context.Context, condition string) (conformance.Restore, error) {
	restore := func(ctx context.Context) error { return s.alter(ctx, "DROP CONSTRAINT diehard_check") }
	return restore, s.alter(ctx, "ADD CONSTRAINT diehard_check CHECK "+condition)
}

func (s *Scratch) alter(ctx context.Context, change string) error {
	return s.exec(ctx, "ALTER TABLE "+s.sink.table+onCluster(s.o.Cluster)+" "+change)
}

func (s *Scratch) exec(ctx context.Context, statement string) error {
	if err := s.sink.conn.Exec(ctx, statement); err != nil {
		kind, _, _ := strings.Cut(statement, " TABLE ")
		return s.sink.classify(ctx, kind+" a scratch table", err)
	}
	return nil
}

// stored reads rows, and returns an error if a merge may have removed duplicates. It reads
// times as numbers, because the driver supports times only up to 2262.
func (s *Scratch) stored(ctx context.Context, ids []uuid.UUID) (*sink.Events, error) {
	resolving, err := s.sink.resolving(ctx)
	if err != nil {
		return nil, err
	}
	var level uint64
	if err := s.sink.conn.QueryRow(resolving, "SELECT toUInt64(max(level)) FROM system.parts"+
		" WHERE active AND database = currentDatabase() AND table = "+quoteString(s.o.Table)).Scan(&level); err != nil {
		return nil, s.sink.classify(ctx, "read the parts of the scratch table", err)
	}
	if level > 0 {
		return nil, errors.New("a merge has changed the scratch table, so duplicates cannot be counted")
	}
	stored := &sink.Events{}
	for first := 0; first < len(ids); first += presentChunk {
		if err := s.read(resolving, ids[first:min(len(ids), first+presentChunk)], stored); err != nil {
			return nil, s.sink.classify(ctx, "read the scratch table", err)
		}
	}
	return stored, nil
}

func (s *Scratch) read(resolving context.Context, ids []uuid.UUID, e *sink.Events) error {
	texts := make([]string, len(ids))
	for i, id := range ids {
		texts[i] = id.String()
	}
	rows, err := s.sink.conn.Query(resolving, "SELECT event_id, event_type, toUnixTimestamp64Micro(event_date_time), environment, event_context, metadata_version"+
		" FROM "+s.sink.table+" WHERE event_id IN (SELECT toUUID(arrayJoin(splitByChar(',', '"+strings.Join(texts, ",")+"'))))")
	if err != nil {
		return err //nolint:wrapcheck // the caller classifies it
	}
	defer rows.Close()
	for rows.Next() {
		var (
			id                                   uuid.UUID
			eventType, environment, eventContext string
			at                                   int64
			version                              uint64
		)
		if err := rows.Scan(&id, &eventType, &at, &environment, &eventContext, &version); err != nil {
			return err //nolint:wrapcheck // the caller classifies it
		}
		e.EventID = append(e.EventID, id)
		e.EventType.Append([]byte(eventType))
		e.EventDateTime = append(e.EventDateTime, at)
		e.Environment.Append([]byte(environment))
		e.EventContext.Append([]byte(eventContext))
		e.MetadataVersion = append(e.MetadataVersion, version)
	}
	return rows.Err() //nolint:wrapcheck // the caller classifies it
}
