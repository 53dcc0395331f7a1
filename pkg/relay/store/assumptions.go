package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"
	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"

	"github.com/diehard-outbox/diehard/pkg/postgres"
)

// Assumption is a property of PostgreSQL that the delivery relies on.
type Assumption struct {
	// Object is the setting, the right or the object, in Markdown.
	Object string
	// Reason is the purpose of the property.
	Reason string
	// Met is how the store ensures the property.
	Met Means
}

// Means is how an assumption is met.
type Means string

// The values of Means.
const (
	// SetOnSession is a setting of each connection. It overrides ALTER DATABASE, ALTER
	// ROLE and the DSN.
	SetOnSession Means = "set on the session"
	// SetOnStatement is a setting of each transaction or statement.
	SetOnStatement Means = "set on the statement"
	// Checked is a property that Check verifies.
	Checked Means = "checked"
	// Warned is a property without which PostgreSQL can lose committed data in a crash.
	// Check reports it.
	Warned Means = "warned about"
)

// Assumptions returns everything in PostgreSQL that the delivery relies on.
// docs/delivery.md contains it as a table.
func Assumptions() []Assumption {
	all := make([]Assumption, 0, len(sessionSettings)+len(statementAssumptions)+len(tables)+len(checkedAssumptions)+len(durabilitySettings))
	for _, setting := range sessionSettings {
		all = append(all, Assumption{"`" + setting.name + "` = " + setting.shown, setting.reason, SetOnSession})
	}
	all = append(all, statementAssumptions...)
	for _, t := range tables {
		all = append(all, Assumption{
			"the rights " + strings.Join(t.rights, ", ") + " on `" + t.name + "`", t.reason, Checked,
		})
	}
	all = append(all, checkedAssumptions...)
	for _, setting := range durabilitySettings {
		all = append(all, Assumption{"`" + setting.name + "` = " + setting.value, setting.reason, Warned})
	}
	return all
}

// sessionSetting is a setting of each connection.
type sessionSetting struct {
	name   string
	shown  string // the value in the documentation
	value  func(flushTimeout time.Duration) string
	reason string
}

func constant(name, value, reason string) sessionSetting {
	return sessionSetting{name, value, func(time.Duration) string { return value }, reason}
}

func limit(name string, d time.Duration, reason string) sessionSetting {
	value := strconv.FormatInt(d.Milliseconds(), 10)
	shown := d.String()
	if minutes, whole := strings.CutSuffix(shown, "m0s"); whole {
		shown = minutes + "m"
	}
	return sessionSetting{name, shown, func(time.Duration) string { return value }, reason}
}

const (
	stablePlans    = "Plans do not depend on statistics, which are always out of date for these tables."
	readsInOrder   = "PostgreSQL reads the events in the order of their ids, and in one process."
	deadConnection = "The locks of a dead machine survive for a short time only."
)

// sessionSettings are the settings of Session.
var sessionSettings = []sessionSetting{
	constant("synchronous_commit", "on", "A committed cut or attempt survives a crash of PostgreSQL."),
	constant("default_transaction_isolation", "read committed",
		"A statement reads the rows that other workers have committed before it. Stricter levels fail with serialization errors."),
	constant("row_security", "off", "If row level security hides rows, statements fail. Otherwise events would wait forever."),
	constant("idle_session_timeout", "0", "The server does not end idle connections of the pool."),
	constant("transaction_timeout", "0",
		"A lease lasts as long as its insert. The setting exists since PostgreSQL 17."),
	{"idle_in_transaction_session_timeout", "`relay.flush_timeout` + " + leaseMargin.String(), func(flushTimeout time.Duration) string {
		return strconv.FormatInt((flushTimeout + leaseMargin).Milliseconds(), 10)
	}, "A suspended worker keeps its batch for a limited time. A shorter limit would end leases during an insert."},
	limit("statement_timeout", 5*time.Minute, "A statement does not hold locks forever."),
	limit("lock_timeout", 30*time.Second, "A statement does not wait forever for a lock."),
	constant("tcp_keepalives_idle", "10", deadConnection),
	constant("tcp_keepalives_interval", "5", deadConnection),
	constant("tcp_keepalives_count", "3", deadConnection),
	limit("tcp_user_timeout", 25*time.Second, deadConnection),
	constant("jit", "off", stablePlans),
	constant("enable_seqscan", "off", stablePlans),
	constant("enable_bitmapscan", "off", stablePlans),
	constant("enable_memoize", "off", stablePlans),
	constant("enable_hashjoin", "off", stablePlans),
	constant("enable_mergejoin", "off", stablePlans),
	constant("enable_indexscan", "on", readsInOrder),
	constant("enable_indexonlyscan", "on", stablePlans),
	constant("enable_nestloop", "on", stablePlans),
	constant("enable_sort", "on", stablePlans),
	constant("max_parallel_workers_per_gather", "0", readsInOrder),
	constant("plan_cache_mode", "auto", stablePlans),
}

// Session returns the settings that the store's connections must have. flushTimeout bounds
// the idle time of a lease's transaction.
func Session(flushTimeout time.Duration) map[string]string {
	settings := make(map[string]string, len(sessionSettings))
	for _, setting := range sessionSettings {
		settings[setting.name] = setting.value(flushTimeout)
	}
	return settings
}

// statementAssumptions are the settings of transactions and statements. Poolers can share
// sessions, and then the settings of a session are those of another client.
var statementAssumptions = []Assumption{
	{"`ISOLATION LEVEL READ COMMITTED`", "As above, for each transaction.", SetOnStatement},
	{"`synchronous_commit` = on", "As above, for the statement that counts an attempt. It is its own transaction.", SetOnStatement},
	{
		"`idle_in_transaction_session_timeout` = 10s",
		"A suspended relay holds the lock of the fleet for a limited time.", SetOnStatement,
	},
	{
		"all settings of the session", "Behind a pooler that shares sessions, each transaction sets them for itself, and the statements of the delivery are in transactions.",
		SetOnStatement,
	},
}

// outboxTable is a table with the rights that a relay needs, even if it needs them only
// after a failover.
type outboxTable struct {
	name   string
	rights []string
	reason string
}

// tables are the tables of the outbox. FOR UPDATE requires UPDATE.
var tables = []outboxTable{
	{"outbox_events", []string{"SELECT", "DELETE"}, "A relay reads events, and deletes the delivered events."},
	{
		"outbox_batches",
		[]string{"SELECT", "INSERT", "UPDATE", "DELETE"},
		"A relay writes, claims, changes and deletes batches.",
	},
	{
		"outbox_cursor",
		[]string{"SELECT", "INSERT", "UPDATE", "DELETE"},
		"A relay locks and moves the cursor. It repairs the cursor after a restore or a truncation.",
	},
	{
		"outbox_history",
		[]string{"SELECT", "INSERT", "UPDATE", "DELETE"},
		"A relay records a change of history. It repairs the history after a restore or a truncation.",
	},
	{"outbox_fuse", []string{"SELECT", "INSERT", "UPDATE"}, "A relay counts dead letters against the fuse."},
	{"outbox_pause", []string{"SELECT"}, "A relay delivers nothing while an operator has paused the fleet."},
	{
		"outbox_quarantine",
		[]string{"SELECT", "INSERT", "DELETE"},
		"A relay puts event types that the sink does not take into quarantine, and releases them.",
	},
	{"outbox_dead_letters", []string{"SELECT", "INSERT"}, "A relay writes and counts dead letters."},
}

// checkedAssumptions are the other properties that Check verifies.
var checkedAssumptions = []Assumption{
	{"the right SELECT or USAGE on the sequence of `outbox_events`", "After a failover, a relay reads the last id that was drawn.", Checked},
	{"the right EXECUTE on the function `diehard_server`", "A relay reads the identity of the server to notice a failover.", Checked},
	{"no row level security for the role, on all tables", "Hidden rows would wait forever, or look deleted.", Checked},
	{"all tables are permanent, not unlogged", "A crash of PostgreSQL empties an unlogged table, and a replica has no rows of it.", Checked},
	{"a valid primary key of all tables", "An id identifies one row, also after a restore or a replication that lost indexes.", Checked},
	{"the constraint `outbox_batches_are_disjoint`", "No event is in two batches.", Checked},
	{"the identity of `outbox_events.id` ascends and does not cycle", "Events are cut in the order of their ids.", Checked},
	{
		"`synchronous_commit`, `row_security` and the isolation level in effect",
		"A proxy in front of PostgreSQL can drop the settings of sessions and transactions.", Checked,
	},
	{"the encoding of the database is UTF8", "The database accepts all events, and only valid UTF-8. `migrate` and the API check it too.", Checked},
}

// durabilitySettings are settings of the server that no client can change.
var durabilitySettings = []struct{ name, value, reason string }{
	{"fsync", "on", "Otherwise a crash of the machine loses committed data, or corrupts the database."},
	{"full_page_writes", "on", "Otherwise a crash of the machine can corrupt pages, unless the file system prevents torn pages."},
	{"data_sync_retry", "off", "Otherwise PostgreSQL continues after an error of fsync, although the data may be lost."},
	{"zero_damaged_pages", "off", "Otherwise PostgreSQL empties damaged pages instead of reporting them."},
}

// Check verifies the assumptions that PostgreSQL and the role have to meet. It returns a
// *postgres.UnsuitableError for the first assumption that is not met. The result contains
// the names of settings with which PostgreSQL can lose committed data in a crash. Check
// also records the flush timeout for other relays, and the identifier of the server if it
// was unknown.
func (s *Store) Check(ctx context.Context) (unsafe []string, err error) {
	tx, err := s.begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("check postgresql: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // does nothing after a commit
	found, err := s.inspect(ctx, tx)
	if len(found.Problems) > 0 {
		return nil, found.Problems[0].Err
	}
	if err == nil {
		err = s.raiseFlushTimeout(ctx, tx)
	}
	if err == nil {
		err = s.completeIdentity(ctx, tx)
	}
	if err != nil {
		return nil, s.checkError(err)
	}
	if err := tx.Commit(); err != nil {
		return nil, fmt.Errorf("check postgresql: commit: %w", err)
	}
	return found.Unsafe, nil
}

// Inspection is the result of Inspect.
type Inspection struct {
	Problems []Problem
	// Unsafe contains the names of settings with which PostgreSQL can lose committed data
	// in a crash.
	Unsafe []string
	// NoTimeline says that the server does not show its timeline, so that each restart
	// counts as a change of history, unless Options.Lossless is set.
	NoTimeline bool
	// Complete says that all assumptions were verified.
	Complete bool
}

// Problem is an assumption that is not met.
type Problem struct {
	Part Part
	Err  *postgres.UnsuitableError
}

// Part is a kind of assumption.
type Part string

// The values of Part.
const (
	Rights   Part = "rights"
	Tables   Part = "tables"
	Settings Part = "settings"
)

// Inspect verifies the same assumptions as Check. It returns all problems that it can find,
// and changes nothing. A warning about unsafe settings is not a problem.
func (s *Store) Inspect(ctx context.Context) (Inspection, error) {
	tx, err := s.begin(ctx)
	if err != nil {
		return Inspection{}, fmt.Errorf("check postgresql: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // the transaction only reads
	found, err := s.inspect(ctx, tx)
	if err != nil && len(found.Problems) == 0 {
		return found, s.checkError(err)
	}
	return found, nil
}

// checkError returns the error of a check with its operation.
func (s *Store) checkError(err error) error {
	if refused, ok := errors.AsType[*pq.Error](err); ok && refused.Code == pqerror.InsufficientPrivilege {
		return s.unreadable(err)
	}
	return fmt.Errorf("check postgresql: %w", err)
}

// UnsafeWarning returns the danger and the remedy of a setting of Inspection.Unsafe.
func UnsafeWarning(name string) (problem, remedy string) {
	for _, setting := range durabilitySettings {
		if setting.name == name {
			return fmt.Sprintf("%s is not %s: %s", name, setting.value, strings.TrimPrefix(setting.reason, "Otherwise ")),
				fmt.Sprintf("set %s = %s in postgresql.conf", name, setting.value)
		}
	}
	return name, ""
}

// RightsText returns the rights of a relay that Inspect verifies, for messages.
func RightsText() string {
	return fmt.Sprintf("all rights on %d tables, the sequence of outbox_events and the function diehard_server", len(tables))
}

// unreadable is the error if the role may not even see the tables.
func (s *Store) unreadable(cause error) error {
	remedy := "GRANT USAGE ON SCHEMA " + pq.QuoteIdentifier(s.o.Schema) + " to the role"
	if s.o.Schema == "" {
		remedy = "grant USAGE on the schema of the outbox to the role"
	}
	return &postgres.UnsuitableError{Problem: fmt.Sprintf("the role may not read the outbox (%v)", cause), Remedy: remedy}
}

func (i *Inspection) add(part Part, remedy, problem string, args ...any) {
	i.Problems = append(i.Problems, Problem{part, &postgres.UnsuitableError{Problem: fmt.Sprintf(problem, args...), Remedy: remedy}})
}

func (s *Store) inspect(ctx context.Context, tx *sqlx.Tx) (found Inspection, err error) {
	if complete, err := s.checkTables(ctx, tx, &found); err != nil || !complete {
		return found, err
	}
	var server struct {
		Role              string  `db:"role"`
		Encoding          string  `db:"encoding"`
		SynchronousCommit string  `db:"synchronous_commit"`
		RowSecurity       string  `db:"row_security"`
		Isolation         string  `db:"isolation"`
		HasIdentity       bool    `db:"has_identity"`
		ReadsIdentity     bool    `db:"reads_identity"`
		Disjoint          bool    `db:"disjoint"`
		Sequence          *string `db:"sequence"`
		ReadsSequence     bool    `db:"reads_sequence"`
		Ascends           bool    `db:"ascends"`
	}
	if err := tx.GetContext(ctx, &server, s.sql(checkServerSQL)); err != nil {
		return found, err //nolint:wrapcheck // checkError wraps it
	}
	role := pq.QuoteIdentifier(server.Role)
	events, batches := s.sql("{schema}outbox_events"), s.sql("{schema}outbox_batches")
	const direct = "connect to PostgreSQL directly, or through a pooler in session mode"
	if server.Encoding != "UTF8" {
		found.add(Settings, "create a database with ENCODING 'UTF8' and move the tables there",
			"the database has the encoding %s instead of UTF8", server.Encoding)
	}
	if !slices.Contains([]string{"on", "remote_apply"}, server.SynchronousCommit) {
		found.add(Settings, direct, "synchronous_commit is %s in a transaction of the relay", server.SynchronousCommit)
	}
	if server.RowSecurity != "off" {
		found.add(Settings, direct, "row_security is %s in a transaction of the relay", server.RowSecurity)
	}
	if server.Isolation != "read committed" {
		found.add(Settings, direct, "the isolation level is %s in a transaction of the relay", server.Isolation)
	}
	switch {
	case !server.HasIdentity:
		found.add(Tables, "create it with the statement of `relay migrate --print=postgres`, as the owner of the tables",
			"the function diehard_server is missing")
	case !server.ReadsIdentity:
		found.add(Rights, s.sql("GRANT EXECUTE ON FUNCTION {schema}diehard_server() TO ")+role,
			"the role %s may not read the identity of the server", server.Role)
	default:
		if err := tx.GetContext(ctx, &found.NoTimeline, s.sql(noTimelineSQL)); err != nil {
			return found, err //nolint:wrapcheck // checkError wraps it
		}
	}
	if !server.Disjoint {
		found.add(Tables, "ALTER TABLE "+batches+" ADD CONSTRAINT outbox_batches_are_disjoint EXCLUDE USING gist (event_ids WITH &&)",
			"the constraint outbox_batches_are_disjoint is missing or invalid")
	}
	switch {
	case server.Sequence == nil:
		found.add(Tables, "ALTER TABLE "+events+" ALTER id ADD GENERATED ALWAYS AS IDENTITY, and set the sequence above the highest id",
			"the column id of outbox_events has no sequence")
	case !server.ReadsSequence:
		found.add(Rights, "GRANT SELECT ON SEQUENCE "+*server.Sequence+" TO "+role,
			"the role %s may not read the sequence of outbox_events", server.Role)
	case !server.Ascends:
		found.add(Tables, "ALTER SEQUENCE "+*server.Sequence+" INCREMENT BY 1 MINVALUE 1 NO CYCLE",
			"the sequence of outbox_events does not ascend, or cycles")
	}
	found.Unsafe, err = s.checkDurability(ctx, tx)
	found.Complete = err == nil
	return found, err
}

// checkTables checks the rights and the properties of each table. It returns whether all
// tables exist.
func (s *Store) checkTables(ctx context.Context, tx *sqlx.Tx, inspection *Inspection) (complete bool, err error) {
	names, rights := make([]string, len(tables)), make([]string, len(tables))
	for i, t := range tables {
		names[i], rights[i] = t.name, strings.Join(t.rights, ",")
	}
	var found []struct {
		Wanted  string  `db:"wanted"`
		Role    string  `db:"role"`
		Name    *string `db:"name"`
		Missing *string `db:"missing"`
		Hidden  bool    `db:"hidden"`
		Logged  bool    `db:"logged"`
		HasKey  bool    `db:"has_key"`
	}
	if err := tx.SelectContext(ctx, &found, s.sql(checkTablesSQL), pq.Array(names), pq.Array(rights)); err != nil {
		return false, err //nolint:wrapcheck // checkError wraps it
	}
	complete = true
	for _, t := range found {
		role := pq.QuoteIdentifier(t.Role)
		if t.Name == nil {
			complete = false
			inspection.add(Tables, "run `relay migrate`, or set postgres.schema to the schema of the outbox", "the table %s is missing", t.Wanted)
			continue
		}
		if t.Missing != nil {
			inspection.add(Rights, "GRANT "+*t.Missing+" ON "+*t.Name+" TO "+role,
				"the role %s lacks rights on %s: %s", t.Role, t.Wanted, *t.Missing)
		}
		if t.Hidden {
			inspection.add(Rights, "ALTER ROLE "+role+" BYPASSRLS, or ALTER TABLE "+*t.Name+" DISABLE ROW LEVEL SECURITY",
				"row level security hides rows of %s from the role %s", t.Wanted, t.Role)
		}
		if !t.Logged {
			inspection.add(Tables, "ALTER TABLE "+*t.Name+" SET LOGGED",
				"the table %s is unlogged: a crash of PostgreSQL empties it", t.Wanted)
		}
		if !t.HasKey {
			inspection.add(Tables, "add the primary key of `relay migrate --print=postgres` to "+*t.Name, "the table %s has no valid primary key", t.Wanted)
		}
	}
	return complete, nil
}

func (s *Store) checkDurability(ctx context.Context, tx *sqlx.Tx) (unsafe []string, err error) {
	safe := make(map[string]string, len(durabilitySettings))
	for _, setting := range durabilitySettings {
		safe[setting.name] = setting.value
	}
	var settings []struct {
		Name  string `db:"name"`
		Value string `db:"value"`
	}
	if err := tx.SelectContext(ctx, &settings, durabilitySQL, pq.Array(slices.Sorted(maps.Keys(safe)))); err != nil {
		return nil, err //nolint:wrapcheck // checkError wraps it
	}
	for _, setting := range settings {
		if setting.Value != safe[setting.Name] {
			unsafe = append(unsafe, setting.Name)
		}
	}
	return unsafe, nil
}

// checkTablesSQL returns a row for each table $1: its name for statements or NULL if it is
// missing, and the rights of $2 that the role lacks.
const checkTablesSQL = `
SELECT wanted.name AS wanted, current_user AS role, found.oid::regclass::text AS name,
       (SELECT string_agg(wanted_right, ', ' ORDER BY n)
        FROM unnest(string_to_array(wanted.rights, ',')) WITH ORDINALITY AS needed (wanted_right, n)
        WHERE NOT has_table_privilege(found.oid, wanted_right)) AS missing,
       coalesce(row_security_active(found.oid), false) AS hidden,
       coalesce((SELECT relpersistence = 'p' FROM pg_class WHERE oid = found.oid), false) AS logged,
       EXISTS (SELECT FROM pg_index WHERE indrelid = found.oid AND indisprimary AND indisvalid) AS has_key
FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS wanted (name, rights, position)
CROSS JOIN LATERAL (SELECT to_regclass('{schema_literal}' || wanted.name)::oid AS oid) AS found
ORDER BY position`

// checkServerSQL returns the other properties that Check verifies.
const checkServerSQL = `
WITH sequence AS (SELECT pg_get_serial_sequence('{schema_literal}outbox_events', 'id') AS name)
SELECT current_user                                                 AS role,
       current_setting('server_encoding')                           AS encoding,
       current_setting('synchronous_commit')                        AS synchronous_commit,
       current_setting('row_security')                              AS row_security,
       current_setting('transaction_isolation')                     AS isolation,
       to_regprocedure('{schema_literal}diehard_server()') IS NOT NULL AS has_identity,
       coalesce(has_function_privilege(to_regprocedure('{schema_literal}diehard_server()')::oid, 'EXECUTE'), false) AS reads_identity,
       EXISTS (
           SELECT FROM pg_constraint JOIN pg_index ON indexrelid = conindid
           WHERE conrelid = to_regclass('{schema_literal}outbox_batches')
             AND conname = 'outbox_batches_are_disjoint' AND contype = 'x' AND NOT condeferrable AND indisvalid
       )                                                            AS disjoint,
       sequence.name                                                AS sequence,
       coalesce(has_sequence_privilege(sequence.name, 'SELECT, USAGE'), false) AS reads_sequence,
       coalesce((SELECT seqincrement > 0 AND seqmin > 0 AND NOT seqcycle FROM pg_sequence
                 WHERE seqrelid = sequence.name::regclass), false)  AS ascends
FROM sequence`

const noTimelineSQL = `SELECT ` + isTimelineUnknownSQL + ` FROM {schema}diehard_server() AS server`

// durabilitySQL returns the values of the settings $1. Settings that the server does not
// know are left out.
const durabilitySQL = `
SELECT name, current_setting(name, true) AS value
FROM unnest($1::text[]) AS name
WHERE current_setting(name, true) IS NOT NULL
ORDER BY name`
