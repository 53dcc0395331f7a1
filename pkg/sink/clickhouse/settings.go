package clickhouse

import (
	"context"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"

	chgo "github.com/ClickHouse/clickhouse-go/v2"
)

// insertSettings are sent with every insert. They do not depend on a profile or on the
// server's version.
//
// https://clickhouse.com/docs/operations/settings/settings
var insertSettings = chgo.Settings{
	// The server checks the token. It acknowledges the insert only after its execution.
	"insert_deduplicate": 1,
	"async_insert":       0,
	// A timeout is an error, even if a profile makes it a success.
	"timeout_overflow_mode": throw,
	// A batch may have events of more than 100 months. The default would then cause an
	// error that looks like backpressure (TOO_MANY_PARTS).
	"max_partitions_per_insert_block": 0,
	// The server neither splits the client's block nor joins it with another block.
	"max_insert_block_size":       MaxBatchRows + 1,
	"min_insert_block_size_rows":  MaxBatchRows + 1,
	"min_insert_block_size_bytes": 256 << 20,
	// The server does not merge the rows before it stores them. The merge would take a
	// sixth of the insert's time, and would hide an event that was inserted twice.
	"optimize_on_insert": 0,
}

// optionalInsertSettings are sent with an insert if the server knows them. The server
// refuses an insert with an unknown setting.
var optionalInsertSettings = chgo.Settings{
	// Overrides insert_deduplicate.
	"deduplicate_insert": "enable",
	// If these settings were on, the server would split the client's block.
	"use_strict_insert_block_limits": 0,
	"max_insert_block_size_bytes":    0,
}

// httpSettings are settings of the HTTP interface. The server sends the status line after
// the execution, so that a 200 is an acknowledgement.
//
// https://clickhouse.com/docs/interfaces/http#response-buffering
var httpSettings = chgo.Settings{"wait_end_of_query": 1}

// throw is the overflow mode in which a query that exceeds a limit fails. The other mode
// returns an incomplete result.
const throw = "throw"

// answerSettings are sent with every query of the resolve step, if the server knows them.
// They prevent an incomplete or outdated result, or make it an error, even if the user's
// profile causes or allows such a result.
var answerSettings = chgo.Settings{
	"select_sequential_consistency": 1,
	"skip_unavailable_shards":       0,
	"use_query_cache":               0,
	"use_query_condition_cache":     0,
	"final":                         0,

	// A profile can filter the rows of a table and of a result.
	"additional_table_filters": "{}",
	"additional_result_filter": "",
	"limit":                    0,
	"offset":                   0,

	// A row that was deleted on purpose is present: the relay must not insert it again.
	"apply_deleted_mask":     0,
	"apply_mutations_on_fly": 0,
	"apply_patch_parts":      0,

	"read_overflow_mode":         throw,
	"read_overflow_mode_leaf":    throw,
	"group_by_overflow_mode":     throw,
	"sort_overflow_mode":         throw,
	"result_overflow_mode":       throw,
	"timeout_overflow_mode":      throw,
	"timeout_overflow_mode_leaf": throw,
	"set_overflow_mode":          throw,
	"distinct_overflow_mode":     throw,
	"transfer_overflow_mode":     throw,

	// The sink reads one row, which must be the result of all servers.
	"distributed_group_by_no_merge":                     0,
	"aggregate_functions_null_for_empty":                0,
	"empty_result_for_aggregation_by_empty_set":         0,
	"enable_parallel_replicas":                          0,
	"allow_experimental_parallel_reading_from_replicas": 0,

	// Otherwise the server can count rows in the metadata of parts or in projections,
	// without the user's row policies.
	"optimize_trivial_count_query":               0,
	"optimize_use_projections":                   0,
	"optimize_use_implicit_projections":          0,
	"allow_experimental_projection_optimization": 0,
}

// limitSettings are sent with every query of the resolve step, if the server knows them
// and the user may change them. They only bound resources. A profile can bound queries
// and not inserts. Without these settings, inserts would then pass, and every presence
// check would fail.
var limitSettings = chgo.Settings{
	"max_rows_to_read":                     0,
	"max_bytes_to_read":                    0,
	"max_rows_to_read_leaf":                0,
	"max_bytes_to_read_leaf":               0,
	"max_rows_to_group_by":                 0,
	"max_rows_to_sort":                     0,
	"max_bytes_to_sort":                    0,
	"max_result_rows":                      0,
	"max_result_bytes":                     0,
	"max_rows_in_set":                      0,
	"max_bytes_in_set":                     0,
	"max_rows_in_distinct":                 0,
	"max_bytes_in_distinct":                0,
	"max_rows_to_transfer":                 0,
	"max_bytes_to_transfer":                0,
	"max_columns_to_read":                  0,
	"max_temporary_columns":                0,
	"max_temporary_non_const_columns":      0,
	"max_partitions_to_read":               -1,
	"max_memory_usage":                     0,
	"max_execution_time_leaf":              0,
	"max_estimated_execution_time":         0,
	"min_execution_speed":                  0,
	"min_execution_speed_bytes":            0,
	"max_execution_speed":                  0,
	"max_execution_speed_bytes":            0,
	"max_concurrent_queries_for_user":      0,
	"max_concurrent_queries_for_all_users": 0,
	"force_index_by_date":                  0,
	"force_primary_key":                    0,
	"force_optimize_projection":            0,
	"force_optimize_projection_name":       "",
	"force_optimize_skip_unused_shards":    0,
	"max_query_size":                       16 << 20,
	"max_ast_elements":                     math.MaxInt32,
	"max_expanded_ast_elements":            math.MaxInt32,
	"max_ast_depth":                        1_000,
	"max_parser_depth":                     1_000,
	"max_parser_backtracks":                1_000_000,
	"max_subquery_depth":                   100,
}

// serverFacts are the facts about a server that the sink reads after each new connection.
type serverFacts struct {
	dials   uint64
	inserts chgo.Settings // the settings of optionalInsertSettings that the server knows
	queries chgo.Settings // the settings of the resolve step that the server knows and the user may change
	times   timeRange
}

// facts returns the facts about the server. It reads them again after each new
// connection, because the server may have been upgraded.
func (s *Sink) facts(ctx context.Context) (*serverFacts, error) {
	if known := s.known.Load(); known != nil && known.dials == s.dials.Load() {
		return known, nil
	}
	quoted := slices.Sorted(maps.Keys(optionalInsertSettings))
	for _, settings := range []chgo.Settings{answerSettings, limitSettings} {
		quoted = slices.AppendSeq(quoted, maps.Keys(settings))
	}
	var known, fixed []string
	accepted, err := s.queryAccepted(ctx, "SELECT groupArray(name), groupArrayIf(name, readonly != 0 OR isNotNull(min) OR isNotNull(max))"+
		" FROM system.settings WHERE name IN ("+quoteStrings(quoted)+")", &known, &fixed)
	if err != nil {
		return nil, err
	}
	times, err := s.probeTimes(chgo.Context(ctx, chgo.WithSettings(accepted)))
	if err != nil {
		return nil, err
	}
	facts := &serverFacts{dials: s.dials.Load(), inserts: chgo.Settings{}, queries: chgo.Settings{}, times: times}
	for _, name := range known {
		if value, ok := optionalInsertSettings[name]; ok {
			facts.inserts[name] = value
		}
		if value, ok := answerSettings[name]; ok {
			facts.queries[name] = value
		}
		if value, ok := limitSettings[name]; ok && !slices.Contains(fixed, name) {
			facts.queries[name] = value
		}
	}
	s.known.Store(facts)
	return facts, nil
}

// queryAccepted executes a query with all settings of the resolve step that the server
// accepts, and returns these settings. A limit of the user's profile may be too small even
// for the query that reads the server's settings.
func (s *Sink) queryAccepted(ctx context.Context, statement string, dest ...any) (chgo.Settings, error) {
	settings := chgo.Settings{}
	if last := s.accepted.Load(); last != nil {
		maps.Copy(settings, *last)
	} else {
		maps.Copy(settings, answerSettings)
		maps.Copy(settings, limitSettings)
	}
	for {
		err := s.conn.QueryRow(chgo.Context(ctx, chgo.WithSettings(settings)), statement).Scan(dest...)
		if err == nil {
			s.accepted.Store(&settings)
			return settings, nil
		}
		err = s.classify(ctx, "read the server's settings", err)
		before := len(settings)
		switch {
		case hasCode(err, readonlyMode): // the user may change no setting; Check refuses the user
			clear(settings)
		case hasCode(err, unknownSetting, settingConstraintViolation, readonlySetting):
			maps.DeleteFunc(settings, func(name string, _ any) bool { return names(err, name) })
		}
		if len(settings) == before {
			return nil, err
		}
	}
}

// names returns whether the error names the setting.
func names(err error, setting string) bool {
	return slices.Contains(strings.FieldsFunc(err.Error(), func(r rune) bool {
		return r != '_' && !unicode.IsLetter(r) && !unicode.IsDigit(r)
	}), setting)
}

// settingsOfInsert returns a copy of the settings of an insert.
func (s *Sink) settingsOfInsert(ctx context.Context) (chgo.Settings, error) {
	facts, err := s.facts(ctx)
	if err != nil {
		return nil, err
	}
	settings := maps.Clone(insertSettings)
	if s.http {
		maps.Copy(settings, httpSettings)
	}
	maps.Copy(settings, facts.inserts)
	return settings, nil
}

// resolving returns a context for the queries of the resolve step.
func (s *Sink) resolving(ctx context.Context) (context.Context, error) {
	settings, err := s.settingsOfQuery(ctx)
	if err != nil {
		return nil, err
	}
	return chgo.Context(ctx, chgo.WithSettings(settings)), nil
}

// settingsOfQuery returns a copy of the settings of the resolve step's queries.
func (s *Sink) settingsOfQuery(ctx context.Context) (chgo.Settings, error) {
	facts, err := s.facts(ctx)
	if err != nil {
		return nil, err
	}
	settings := maps.Clone(facts.queries)
	if deadline, ok := ctx.Deadline(); ok {
		settings["max_execution_time"] = secondsUntil(deadline)
	}
	return settings, nil
}

func secondsUntil(deadline time.Time) int64 {
	return max(1, int64(math.Ceil(time.Until(deadline).Seconds())))
}
