package clickhouse

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	chgo "github.com/ClickHouse/clickhouse-go/v2"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Error codes of ClickHouse for which Check returns a remedy.
const (
	unknownDatabase            = 81
	unknownUser                = 192
	wrongPassword              = 193
	requiredPassword           = 194
	readonlyMode               = 164
	badGet                     = 170 // reported for an unknown cluster by versions up to 23
	settingConstraintViolation = 452
	readonlySetting            = 472
	accessDenied               = 497
	authenticationFailed       = 516
	clusterDoesntExist         = 701
)

// Check implements sink.Sink. It checks the database, the user's grants, and the table's
// engine, sorting key, columns and settings.
func (s *Sink) Check(ctx context.Context) error {
	for _, check := range []func(context.Context) error{
		s.checkInsertSettings,
		s.checkTable,
		s.checkProcesses,
		s.checkPresence,
	} {
		if err := check(ctx); err != nil {
			return err
		}
	}
	return nil
}

// checkInsertSettings executes a statement with the settings of an insert, and compares
// the settings that the server has received. It is the first statement of Check, so it
// also detects a missing database.
func (s *Sink) checkInsertSettings(ctx context.Context) error {
	inserts, err := s.settingsOfInsert(ctx)
	var (
		readonly      uint64
		names, values []string
	)
	if err == nil {
		var settings chgo.Settings
		if settings, err = s.settingsOfQuery(ctx); err != nil {
			return err
		}
		delete(settings, "max_memory_usage") // inserts have the limit of the profile
		inserts["insert_deduplication_token"] = checkToken
		maps.Copy(settings, inserts)
		err = s.conn.QueryRow(chgo.Context(ctx, chgo.WithSettings(settings)),
			"SELECT toUInt64(getSetting('readonly')), groupArray(name), groupArray(value) FROM system.settings WHERE name IN ("+
				quoteStrings(slices.Sorted(maps.Keys(inserts)))+")").Scan(&readonly, &names, &values)
		if err != nil {
			err = s.classify(ctx, "check the settings of an insert", err)
		}
	}
	switch {
	case hasCode(err, unknownDatabase):
		return s.databaseMissing()
	case s.readonly && (readonly > 0 || hasCode(err, readonlyMode)):
		return &sink.MisconfiguredError{
			Problem: "the clickhouse dsn sets readonly, which prevents inserts",
			Remedy:  "remove readonly from the clickhouse dsn",
		}
	case readonly > 0, hasCode(err, readonlyMode, readonlySetting, settingConstraintViolation, unknownSetting):
		problem := "the clickhouse user is read-only"
		if err != nil {
			problem = "the clickhouse user may not change settings that every insert needs: " + err.Error()
		}
		return &sink.MisconfiguredError{
			Problem: problem,
			Remedy:  "ALTER USER " + quoteIdentifier(s.user) + " SETTINGS readonly = 0, and no constraints on settings",
		}
	case err != nil:
		return s.checkTransport(ctx, err)
	}
	for i, name := range names {
		if sent := fmt.Sprint(inserts[name]); values[i] != sent {
			return &sink.MisconfiguredError{
				Problem: fmt.Sprintf("clickhouse does not receive the settings of an insert: %s is %q, and the relay has sent %q", name, values[i], sent),
				Remedy:  "let the proxy in front of clickhouse pass all settings, or connect without the proxy",
			}
		}
	}
	return nil
}

// checkToken is the token of a statement that inserts nothing.
const checkToken = "diehard-check"

// checkProcesses executes a query of the resolve step, so that a missing grant or a fixed
// setting is found before the first fault.
func (s *Sink) checkProcesses(ctx context.Context) error {
	_, err := s.InFlight(ctx, checkToken)
	switch {
	case hasCode(err, settingConstraintViolation, readonlySetting):
		return &sink.MisconfiguredError{
			Problem: "the clickhouse user may not change settings that every presence check needs: " + err.Error(),
			Remedy:  "remove the constraint on this setting from the user's settings profile",
		}
	case hasCode(err, accessDenied):
		remedy := "GRANT SELECT ON system.processes TO " + quoteIdentifier(s.user)
		if s.cluster != "" {
			remedy += "; GRANT REMOTE ON *.* TO " + quoteIdentifier(s.user)
		}
		return &sink.MisconfiguredError{
			Problem: "the clickhouse user may not read system.processes, which shows running inserts",
			Remedy:  remedy,
		}
	case s.cluster != "" && hasCode(err, clusterDoesntExist, badGet):
		return &sink.MisconfiguredError{
			Problem: fmt.Sprintf("clickhouse has no cluster %q", s.cluster),
			Remedy:  "set clickhouse.cluster to a result of SELECT DISTINCT cluster FROM system.clusters",
		}
	}
	return err
}

// checkPresence executes the queries of a presence check for a part that does not exist,
// so that a missing grant is found before the first fault.
func (s *Sink) checkPresence(ctx context.Context) error {
	resolving, err := s.resolving(ctx)
	if err != nil {
		return err
	}
	v := &visibility{partitions: []string{"diehard_check"}}
	nothing := []part{{name: "diehard_check"}}
	if v.place, err = s.readPlace(resolving); err == nil {
		_, err = v.parts()
	}
	if err == nil {
		_, err = v.countPiece(nothing)
	}
	if err == nil {
		err = s.conn.QueryRow(resolving, "SELECT groupUniqArray("+identitySQL+") FROM "+s.onReplicas()+
			" WHERE _part = 'diehard_check'").Scan(new([]string))
		if err != nil {
			err = s.classify(ctx, "check the queries of a presence check", err)
		}
	}
	if hasCode(err, accessDenied) {
		return &sink.MisconfiguredError{
			Problem: "the clickhouse user may not execute a presence check: " + err.Error(),
			Remedy: fmt.Sprintf("GRANT SELECT ON %s TO %s; GRANT SELECT ON system.parts TO %[2]s", s.table,
				quoteIdentifier(s.user)),
		}
	}
	return err
}

// table is the server's definition of the table.
type table struct {
	engine, definition, sortingKey string
	columns                        map[string]tableColumn
}

type tableColumn struct {
	kind, typ string // kind is the kind of the column's default, or empty
	inKey     bool   // the column is in the sorting, partition or sampling key
}

// checkTable reads the complete definition first, because a remedy may depend on every
// property of the table.
func (s *Sink) checkTable(ctx context.Context) error {
	ctx, err := s.resolving(ctx)
	if err != nil {
		return err
	}
	t, err := s.readTable(ctx)
	if err != nil {
		return err
	}
	placed, err := s.checkEngine(t)
	if err != nil {
		return err
	}
	if _, err := s.checkTableSettings(ctx, t.definition, placed); err != nil {
		return err
	}
	return s.checkColumns(t)
}

func (s *Sink) readTable(ctx context.Context) (*table, error) {
	t := &table{columns: map[string]tableColumn{}}
	err := s.conn.QueryRow(ctx, "SELECT engine, engine_full, sorting_key FROM system.tables"+
		" WHERE database = currentDatabase() AND name = "+quoteString(s.name)).Scan(&t.engine, &t.definition, &t.sortingKey)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return nil, s.tableMissing()
	case err != nil:
		return nil, s.classify(ctx, "read the table", err)
	}
	var names, kinds, types []string
	var inKey []bool
	err = s.conn.QueryRow(ctx, "SELECT groupArray(name), groupArray(default_kind), groupArray(type),"+
		" groupArray((is_in_sorting_key OR is_in_partition_key OR is_in_sampling_key)::Bool) FROM system.columns"+
		" WHERE database = currentDatabase() AND table = "+quoteString(s.name)).Scan(&names, &kinds, &types, &inKey)
	if err != nil {
		return nil, s.classify(ctx, "read the table's columns", err)
	}
	for i, name := range names {
		t.columns[name] = tableColumn{kind: kinds[i], typ: types[i], inKey: inKey[i]}
	}
	return t, nil
}

func (s *Sink) tableMissing() error {
	return &sink.MisconfiguredError{
		Problem: "the table " + s.table + " does not exist in clickhouse",
		Remedy:  "relay migrate",
	}
}

// family matches the engines that store each insert in parts, record tokens, and merge
// only rows with equal sorting keys. The prefix of the name says where the parts are
// stored.
var family = regexp.MustCompile(`^(Replicated|Shared)?(Replacing)?MergeTree$`)

// checkEngine returns the prefix of the engine's name.
func (s *Sink) checkEngine(t *table) (placed string, err error) {
	match := family.FindStringSubmatch(t.engine)
	if match == nil {
		problem := fmt.Sprintf("the engine of the table %s is %s", s.table, t.engine)
		if t.engine == "Distributed" {
			problem += ", which forwards the rows of an insert later and in pieces"
		} else {
			problem += ", which does not keep every event once"
		}
		return "", &sink.MisconfiguredError{Problem: problem, Remedy: s.recreate(t)}
	}
	placed, replacing := match[1], match[2] != ""
	switch {
	case replacing && !slices.Contains(strings.Split(t.sortingKey, ", "), "event_id"):
		return "", &sink.MisconfiguredError{
			Problem: fmt.Sprintf("the table %s is ordered by (%s), without event_id: merges drop events", s.table, t.sortingKey),
			Remedy:  s.recreate(t),
		}
	case placed != "" && s.cluster == "":
		return "", &sink.MisconfiguredError{
			Problem: fmt.Sprintf("the table %s is replicated, but without clickhouse.cluster the relay checks presence on one replica only", s.table),
			Remedy:  "set clickhouse.cluster to the cluster's name (SELECT DISTINCT cluster FROM system.clusters)",
		}
	case placed == "" && s.cluster != "":
		return "", &sink.MisconfiguredError{
			Problem: fmt.Sprintf("the table %s is not replicated, and a cluster is configured: its servers do not share tokens", s.table),
			Remedy:  s.recreate(t),
		}
	}
	return placed, nil
}

// leastPartsLifetime is the number of seconds for which a table must keep the source
// parts of a merge. ClickHouse does not sync the merged part. Linux begins to write it to
// disk within 30 seconds.
const leastPartsLifetime = 60

// LeastWindow is the least number of blocks whose tokens a table must remember. An insert
// may begin late, after a proxy or a network buffer has held it for its whole deadline.
// In the default deadline of 30 seconds, a fleet sends 120 partial batches, at the default
// linger of 250 ms. Each is one block, or two at the beginning of a month. Full batches
// add up to ten blocks a second. The sum is 540, and the bound is about twice as large.
//
// leastWindowSeconds is the time for which a cluster must remember them.
const (
	LeastWindow        = 1_000
	leastWindowSeconds = 600
)

// checkedSetting is a setting of the table with its value.
type checkedSetting struct{ name, value string }

// checkTableSettings reads the table's settings at the end of its definition, and the
// server's defaults for all other settings. It returns the settings that it has checked.
func (s *Sink) checkTableSettings(ctx context.Context, definition, placed string) ([]checkedSetting, error) {
	type wanted struct {
		name, value string
		least       float64
	}
	settings := []wanted{{windowSetting(placed), "10000", LeastWindow}}
	if placed != "" {
		settings = append(settings, wanted{"replicated_deduplication_window_seconds", "604800", leastWindowSeconds})
	}
	if placed != "Shared" { // its parts are in object storage
		settings = append(settings, wanted{"fsync_after_insert", "1", 1}, wanted{"fsync_part_directory", "1", 1},
			wanted{"old_parts_lifetime", "480", leastPartsLifetime})
	}

	var problems, remedy []string
	checked := make([]checkedSetting, 0, len(settings))
	for _, setting := range settings {
		value, err := s.readTableSetting(ctx, definition, placed, setting.name)
		if err != nil {
			return nil, err
		}
		checked = append(checked, checkedSetting{setting.name, value})
		number, err := strconv.ParseFloat(value, 64) // an interval may be a decimal number, as in "480."
		switch isNumber := err == nil; {
		case value == "false", isNumber && number == 0:
			problems = append(problems, setting.name+" off")
		case isNumber && number < setting.least:
			problems = append(problems, fmt.Sprintf("%s below %g", setting.name, setting.least))
		default:
			continue
		}
		remedy = append(remedy, setting.name+" = "+setting.value)
	}
	if problems != nil {
		return nil, &sink.MisconfiguredError{
			Problem: fmt.Sprintf("the table %s has %s", s.table, strings.Join(problems, ", ")),
			Remedy:  "ALTER TABLE " + s.table + onCluster(s.cluster) + " MODIFY SETTING " + strings.Join(remedy, ", "),
		}
	}
	return checked, nil
}

// windowSetting returns the name of the setting for the deduplication window.
func windowSetting(placed string) string {
	if placed == "" {
		return "non_replicated_deduplication_window"
	}
	return "replicated_deduplication_window"
}

// readTableSetting returns a setting of the table, or the server's default.
func (s *Sink) readTableSetting(ctx context.Context, definition, placed, name string) (string, error) {
	value, ok := tableSetting(definition, name)
	if ok {
		return value, nil
	}
	defaults := "system.merge_tree_settings"
	if placed != "" {
		defaults = "system.replicated_merge_tree_settings"
	}
	if err := s.conn.QueryRow(ctx, "SELECT value FROM "+defaults+" WHERE name = "+quoteString(name)).Scan(&value); err != nil {
		return "", s.classify(ctx, "read the table's settings", err)
	}
	return value, nil
}

// tableSetting returns a setting of the definition. The settings are the end of the
// definition.
func tableSetting(definition, name string) (value string, ok bool) {
	const clause = " SETTINGS "
	at := strings.LastIndex(definition, clause)
	if at < 0 {
		return "", false
	}
	for setting := range strings.SplitSeq(definition[at+len(clause):], ", ") {
		if n, v, _ := strings.Cut(setting, " = "); n == name {
			return strings.Trim(v, "'"), true
		}
	}
	return "", false
}

// acceptedTypes are the types that store a column's values unchanged. The migrations use
// the types in the variable columns.
var acceptedTypes = map[string]*regexp.Regexp{
	"event_id":         regexp.MustCompile(`^UUID$`),
	"event_type":       regexp.MustCompile(`^(LowCardinality\(String\)|String)$`),
	"event_date_time":  regexp.MustCompile(`^DateTime64\(6(, '[^']+')?\)$`),
	"environment":      regexp.MustCompile(`^(LowCardinality\(String\)|String)$`),
	"event_context":    regexp.MustCompile(`^String$`),
	"metadata_version": regexp.MustCompile(`^UInt64$`),
}

func (s *Sink) checkColumns(t *table) error {
	var problems, remedy []string
	keyChanges := false
	for _, c := range columns {
		found, ok := t.columns[c.Name]
		switch {
		case !ok:
			problems = append(problems, "lacks the column "+c.Name)
			remedy = append(remedy, "ADD COLUMN "+c.Name+" "+c.Type)
		case found.kind == ephemeral: // REMOVE does not support EPHEMERAL, and the column stores nothing
			problems = append(problems, "computes the column "+c.Name)
			remedy = append(remedy, "DROP COLUMN "+c.Name+", ADD COLUMN "+c.Name+" "+c.Type)
		case found.kind != "" && found.kind != "DEFAULT":
			problems = append(problems, "computes the column "+c.Name)
			remedy = append(remedy, "MODIFY COLUMN "+c.Name+" REMOVE "+found.kind)
		case !acceptedTypes[c.Name].MatchString(found.typ):
			problems = append(problems, fmt.Sprintf("keeps %s as %s", c.Name, found.typ))
			remedy = append(remedy, "MODIFY COLUMN "+c.Name+" "+c.Type)
			keyChanges = keyChanges || found.inKey
		}
	}
	misconfigured := &sink.MisconfiguredError{
		Problem: "the table " + s.table + " " + strings.Join(problems, ", "),
		Remedy:  "ALTER TABLE " + s.table + onCluster(s.cluster) + " " + strings.Join(remedy, ", "),
	}
	switch {
	case problems == nil:
		return nil
	case keyChanges: // ClickHouse cannot alter a key
		misconfigured.Remedy = s.recreate(t)
	}
	return misconfigured
}

// ephemeral is the kind of a column that accepts values and stores none.
const ephemeral = "EPHEMERAL"

// recreate returns the remedy for a property that ALTER TABLE cannot change. It copies
// the rows of the old table.
func (s *Sink) recreate(t *table) string {
	old := quoteIdentifier(s.name + "_old")
	var names []string
	for _, c := range columns {
		if found, ok := t.columns[c.Name]; ok && found.kind != ephemeral {
			names = append(names, c.Name)
		}
	}
	remedy := fmt.Sprintf("RENAME TABLE %s TO %s%s; then relay migrate", s.table, old, onCluster(s.cluster))
	if names == nil {
		return remedy
	}
	list := strings.Join(names, ", ")
	return remedy + fmt.Sprintf("; then INSERT INTO %s (%s) SELECT %s FROM %s SETTINGS max_partitions_per_insert_block = 0",
		s.table, list, list, old)
}

func onCluster(cluster string) string {
	if cluster == "" {
		return ""
	}
	return " ON CLUSTER " + quoteString(cluster)
}

func hasCode(err error, codes ...int32) bool {
	e, ok := errors.AsType[*serverError](err)
	return ok && slices.Contains(codes, e.code)
}
