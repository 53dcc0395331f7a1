package clickhouse

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	chgo "github.com/ClickHouse/clickhouse-go/v2"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// askSettings go with the questions of the resolve step: an answer is whole and
// fresh, or an error. A profile may say otherwise.
var askSettings = chgo.Settings{
	"select_sequential_consistency": 1,
	"skip_unavailable_shards":       0,
	"use_query_cache":               0,
	"read_overflow_mode":            "throw",
	"result_overflow_mode":          "throw",
	"timeout_overflow_mode":         "throw",
	"max_result_rows":               0,
	"final":                         0,
}

func (s *Sink) asking(ctx context.Context) context.Context {
	return chgo.Context(ctx, chgo.WithSettings(askSettings))
}

// InFlight implements sink.Sink. On a cluster it asks every replica, and one
// that does not answer is an error: it may be running the insert.
func (s *Sink) InFlight(ctx context.Context, token string) (bool, error) {
	processes := "system.processes"
	if s.cluster != "" {
		processes = "clusterAllReplicas(" + quoteString(s.cluster) + ", system.processes)"
	}
	var running uint64
	err := s.conn.QueryRow(s.asking(ctx),
		"SELECT count() FROM "+processes+" WHERE Settings['insert_deduplication_token'] = "+quoteString(token),
	).Scan(&running)
	if err != nil {
		return false, s.classify(ctx, "ask whether the insert is running", err)
	}
	return running > 0, nil
}

const (
	// presentChunk ids make a statement of 195 kB: max_query_size is 256 KiB by
	// default.
	presentChunk = 5_000
	// maxTypesBytes bounds what the event types add to that. Beyond it the time
	// alone prunes.
	maxTypesBytes = 32 << 10
)

// Present implements sink.Sink. On a cluster it asks every replica, for a row
// may not be replicated yet.
//
// A statement asks for up to 5,000 events of neighbouring types and times, which
// is what the table is sorted and partitioned by. It reads without FINAL, which
// would merge.
func (s *Sink) Present(ctx context.Context, keys []sink.Key) ([]bool, error) {
	// An event that cannot be stored was never sent.
	asked := slices.DeleteFunc(slices.Clone(keys), func(k sink.Key) bool { return !storable(k.Time) })
	slices.SortFunc(asked, func(a, b sink.Key) int {
		return cmp.Or(cmp.Compare(a.EventType, b.EventType), a.Time.Compare(b.Time))
	})
	stored := make(map[string]struct{}, len(asked))
	for chunk := range slices.Chunk(asked, presentChunk) {
		// One row for an answer: it arrives whole or not at all.
		var found []string
		if err := s.conn.QueryRow(s.asking(ctx), s.presentStatement(chunk)).Scan(&found); err != nil {
			return nil, s.classify(ctx, "ask which events are there", err)
		}
		for _, identity := range found {
			stored[identity] = struct{}{}
		}
	}
	present := make([]bool, len(keys))
	for i, k := range keys {
		if storable(k.Time) {
			_, present[i] = stored[identityOf(k)]
		}
	}
	return present, nil
}

// identitySQL and identityOf are what makes an event: the table's sorting key.
// Its id alone does not, for whoever publishes may use one twice.
const identitySQL = `concat(event_type, ' ', toString(toUnixTimestamp64Micro(event_date_time)), ' ', toString(event_id))`

func identityOf(k sink.Key) string {
	return k.EventType + " " + strconv.FormatInt(k.Time.UnixMicro(), 10) + " " + k.EventID.String()
}

func (s *Sink) presentStatement(keys []sink.Key) string {
	var q strings.Builder
	q.WriteString("SELECT groupUniqArray(" + identitySQL + ") FROM ")
	if s.cluster != "" {
		q.WriteString("clusterAllReplicas(" + quoteString(s.cluster) + ", currentDatabase(), " + s.table + ")")
	} else {
		q.WriteString(s.table)
	}

	first, last := keys[0].Time, keys[0].Time
	var types []string
	typesBytes := 0
	for _, k := range keys {
		if k.Time.Before(first) {
			first = k.Time
		}
		if k.Time.After(last) {
			last = k.Time
		}
		if len(types) == 0 || types[len(types)-1] != k.EventType { // sorted
			types = append(types, k.EventType)
			typesBytes += 2*len(k.EventType) + len("'', ") // escaped at worst
		}
	}
	q.WriteString(" WHERE event_date_time BETWEEN " + timeLiteral(first) + " AND " + timeLiteral(last))
	if typesBytes <= maxTypesBytes {
		q.WriteString(" AND event_type IN (")
		for i, t := range types {
			if i > 0 {
				q.WriteString(", ")
			}
			q.WriteString(quoteString(t))
		}
		q.WriteByte(')')
	}
	q.WriteString(" AND event_id IN (")
	for i, k := range keys {
		if i > 0 {
			q.WriteByte(',')
		}
		q.WriteString("'" + k.EventID.String() + "'")
	}
	q.WriteByte(')')
	return q.String()
}

// timeLiteral rounds down to the microsecond, as an insert does.
func timeLiteral(t time.Time) string {
	t = t.UTC().Truncate(time.Microsecond)
	return fmt.Sprintf("toDateTime64('%s', 6, 'UTC')", t.Format("2006-01-02 15:04:05.000000"))
}
