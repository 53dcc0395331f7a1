package clickhouse

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	chgo "github.com/ClickHouse/clickhouse-go/v2"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// ClickHouse's codes that tell Check what the operator has to mend.
const (
	unknownDatabase            = 81
	readonlyMode               = 164
	badGet                     = 170 // an unknown cluster, up to version 23
	settingConstraintViolation = 452
	readonlySetting            = 472
	accessDenied               = 497
	clusterDoesntExist         = 701
)

// Check implements sink.Sink. It looks at the database, the user's rights, the
// table's engine, sorting key, columns and settings.
func (s *Sink) Check(ctx context.Context) error {
	for _, check := range []func(context.Context) error{
		s.checkInsertSettings,
		s.checkTable,
		s.checkColumns,
		s.checkProcesses,
	} {
		if err := check(ctx); err != nil {
			return err
		}
	}
	return nil
}

// checkInsertSettings tries the settings of an insert on a statement that does
// nothing. As the first to speak with the server it also finds the database
// missing.
func (s *Sink) checkInsertSettings(ctx context.Context) error {
	settings, err := s.settingsOfInsert(ctx)
	var readonly uint64
	if err == nil {
		err = s.conn.QueryRow(chgo.Context(ctx, chgo.WithSettings(settings)),
			"SELECT toUInt64(getSetting('readonly'))").Scan(&readonly)
		if err != nil {
			err = s.classify(ctx, "try the settings of an insert", err)
		}
	}
	switch {
	case hasCode(err, unknownDatabase):
		return s.databaseMissing()
	case readonly > 0, hasCode(err, readonlyMode, readonlySetting, settingConstraintViolation, unknownSetting):
		problem := "the clickhouse user is read-only"
		if err != nil {
			problem = "clickhouse does not let the user set what every insert needs: " + err.Error()
		}
		return &sink.MisconfiguredError{
			Problem: problem,
			Remedy:  "ALTER USER " + quoteIdentifier(s.user) + " SETTINGS readonly = 0, and no constraints on settings",
		}
	}
	return err
}

// checkProcesses asks what only the resolve step asks otherwise: a missing
// right is found now and not after the first fault.
func (s *Sink) checkProcesses(ctx context.Context) error {
	_, err := s.Running(ctx, "diehard-check")
	switch {
	case hasCode(err, accessDenied):
		remedy := "GRANT SELECT ON system.processes TO " + quoteIdentifier(s.user)
		if s.cluster != "" {
			remedy += "; GRANT REMOTE ON *.* TO " + quoteIdentifier(s.user)
		}
		return &sink.MisconfiguredError{
			Problem: "the clickhouse user may not see whether an insert is still running",
			Remedy:  remedy,
		}
	case s.cluster != "" && hasCode(err, clusterDoesntExist, badGet):
		return &sink.MisconfiguredError{
			Problem: fmt.Sprintf("clickhouse has no cluster %q", s.cluster),
			Remedy:  "name one of SELECT DISTINCT cluster FROM system.clusters",
		}
	}
	return err
}

// family matches the engines that insert by parts and remember tokens, and that
// merge rows away only if their sorting keys are equal. The name's first part
// says where the parts are.
var family = regexp.MustCompile(`^(Replicated|Shared)?(Replacing)?MergeTree$`)

func (s *Sink) checkTable(ctx context.Context) error {
	var engine, full, sortingKey string
	err := s.conn.QueryRow(ctx, "SELECT engine, engine_full, sorting_key FROM system.tables"+
		" WHERE database = currentDatabase() AND name = "+quoteString(s.name)).Scan(&engine, &full, &sortingKey)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return &sink.MisconfiguredError{
			Problem: "the table " + s.table + " does not exist in clickhouse",
			Remedy:  "relay migrate",
		}
	case err != nil:
		return s.classify(ctx, "look at the table", err)
	}

	match := family.FindStringSubmatch(engine)
	if match == nil {
		problem := fmt.Sprintf("the engine of the table %s is %s", s.table, engine)
		if engine == "Distributed" {
			problem += ", which passes an insert's rows on later and in pieces"
		} else {
			problem += ", which does not keep every event once"
		}
		return &sink.MisconfiguredError{Problem: problem, Remedy: s.recreate()}
	}
	placed, replacing := match[1], match[2] != ""
	switch {
	case replacing && !slices.Contains(strings.Split(sortingKey, ", "), "event_id"):
		return &sink.MisconfiguredError{
			Problem: fmt.Sprintf("the table %s is ordered by (%s), without event_id: merges drop events", s.table, sortingKey),
			Remedy:  s.recreate(),
		}
	case placed != "" && s.cluster == "":
		return &sink.MisconfiguredError{
			Problem: fmt.Sprintf("the table %s is replicated, and only one of its replicas would be asked what arrived", s.table),
			Remedy:  "set clickhouse.cluster to the cluster's name (SELECT DISTINCT cluster FROM system.clusters)",
		}
	case placed == "" && s.cluster != "":
		return &sink.MisconfiguredError{
			Problem: fmt.Sprintf("the table %s is not replicated, and a cluster is configured: its servers do not share tokens", s.table),
			Remedy:  s.recreate(),
		}
	}
	return s.checkTableSettings(ctx, full, placed)
}

// checkTableSettings looks for the table's own settings at the end of its
// definition, and for the others among the server's defaults.
func (s *Sink) checkTableSettings(ctx context.Context, definition, placed string) error {
	defaults, window := "system.merge_tree_settings", "non_replicated_deduplication_window"
	if placed != "" {
		defaults, window = "system.replicated_merge_tree_settings", "replicated_deduplication_window"
	}
	wanted := []struct{ name, value string }{{window, "10000"}}
	if placed != "Shared" { // whose parts are in object storage
		wanted = append(wanted, []struct{ name, value string }{{"fsync_after_insert", "1"}, {"fsync_part_directory", "1"}}...)
	}

	var off, remedy []string
	for _, setting := range wanted {
		value, ok := tableSetting(definition, setting.name)
		if !ok {
			err := s.conn.QueryRow(ctx, "SELECT value FROM "+defaults+" WHERE name = "+quoteString(setting.name)).Scan(&value)
			if err != nil {
				return s.classify(ctx, "look at the table's settings", err)
			}
		}
		if value == "0" || value == "false" {
			off = append(off, setting.name)
			remedy = append(remedy, setting.name+" = "+setting.value)
		}
	}
	if off != nil {
		return &sink.MisconfiguredError{
			Problem: fmt.Sprintf("the table %s has %s off", s.table, strings.Join(off, ", ")),
			Remedy:  "ALTER TABLE " + s.table + onCluster(s.cluster) + " MODIFY SETTING " + strings.Join(remedy, ", "),
		}
	}
	return nil
}

// tableSetting finds a setting in the definition, in which the settings come
// last.
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

// typesThatHold are the types that keep a column's values as they are. The first
// of `columns` is what migrations make; these may be chosen instead.
var typesThatHold = map[string]*regexp.Regexp{
	"event_id":         regexp.MustCompile(`^UUID$`),
	"event_type":       regexp.MustCompile(`^(LowCardinality\(String\)|String)$`),
	"event_date_time":  regexp.MustCompile(`^DateTime64\(6(, '[^']+')?\)$`),
	"environment":      regexp.MustCompile(`^(LowCardinality\(String\)|String)$`),
	"event_context":    regexp.MustCompile(`^String$`),
	"metadata_version": regexp.MustCompile(`^UInt64$`),
}

func (s *Sink) checkColumns(ctx context.Context) error {
	var names, types, kinds []string
	err := s.conn.QueryRow(ctx, "SELECT groupArray(name), groupArray(type), groupArray(default_kind) FROM system.columns"+
		" WHERE database = currentDatabase() AND table = "+quoteString(s.name)).Scan(&names, &types, &kinds)
	if err != nil {
		return s.classify(ctx, "look at the table's columns", err)
	}
	var problems, remedy []string
	for _, c := range columns {
		i := slices.Index(names, c.Name)
		switch {
		case i < 0:
			problems = append(problems, "lacks the column "+c.Name)
			remedy = append(remedy, "ADD COLUMN "+c.Name+" "+c.Type)
		case kinds[i] != "" && kinds[i] != "DEFAULT":
			problems = append(problems, "computes the column "+c.Name)
			remedy = append(remedy, "MODIFY COLUMN "+c.Name+" REMOVE "+kinds[i])
		case !typesThatHold[c.Name].MatchString(types[i]):
			problems = append(problems, fmt.Sprintf("keeps %s as %s", c.Name, types[i]))
			remedy = append(remedy, "MODIFY COLUMN "+c.Name+" "+c.Type)
		}
	}
	if problems != nil {
		return &sink.MisconfiguredError{
			Problem: "the table " + s.table + " " + strings.Join(problems, ", "),
			Remedy:  "ALTER TABLE " + s.table + onCluster(s.cluster) + " " + strings.Join(remedy, ", "),
		}
	}
	return nil
}

// recreate is the remedy for what ALTER TABLE cannot change.
func (s *Sink) recreate() string {
	old := quoteIdentifier(s.name + "_old")
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = c.Name
	}
	list := strings.Join(names, ", ")
	return fmt.Sprintf("RENAME TABLE %s TO %s%s; DROP TABLE %s%s; then relay migrate; then INSERT INTO %s (%s) SELECT %s FROM %s",
		s.table, old, onCluster(s.cluster), quoteIdentifier(s.name+versionTableSuffix), onCluster(s.cluster), s.table, list, list, old)
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
