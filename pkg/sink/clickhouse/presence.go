package clickhouse

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	chgo "github.com/ClickHouse/clickhouse-go/v2"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// presenceSettings are the settings of the resolve step's queries. They make an
// incomplete or outdated result an error, even if the user's profile allows such results.
var presenceSettings = chgo.Settings{
	"select_sequential_consistency": 1,
	"skip_unavailable_shards":       0,
	"use_query_cache":               0,
	"read_overflow_mode":            "throw",
	"result_overflow_mode":          "throw",
	"timeout_overflow_mode":         "throw",
	"max_result_rows":               0,
	"final":                         0,
}

func withPresenceSettings(ctx context.Context) context.Context {
	return chgo.Context(ctx, chgo.WithSettings(presenceSettings))
}

// InFlight implements sink.Sink. On a cluster it queries every replica. If a replica does
// not respond, InFlight returns an error, because the replica may be executing the
// insert.
func (s *Sink) InFlight(ctx context.Context, token string) (bool, error) {
	processes := "system.processes"
	if s.cluster != "" {
		processes = "clusterAllReplicas(" + quoteString(s.cluster) + ", system.processes)"
	}
	var inserts uint64
	err := s.conn.QueryRow(withPresenceSettings(ctx),
		"SELECT count() FROM "+processes+" WHERE Settings['insert_deduplication_token'] = "+quoteString(token),
	).Scan(&inserts)
	if err != nil {
		return false, s.classify(ctx, "find inserts in flight", err)
	}
	return inserts > 0, nil
}

const (
	// A statement with presentChunk keys has 195 kB. The default of max_query_size is 256
	// KiB.
	presentChunk = 5_000
	// maxTypesBytes bounds the bytes of event types in a statement. Above the bound, the
	// statement limits its read by time only.
	maxTypesBytes = 32 << 10
)

// Present implements sink.Sink. On a cluster it queries every replica, because a row
// may not be replicated yet.
//
// A statement has up to 5,000 keys of neighbouring types and times, because the table is
// sorted and partitioned by type and time. It reads without FINAL, because FINAL would
// merge rows.
func (s *Sink) Present(ctx context.Context, keys *sink.Keys) ([]bool, error) {
	queried := make([]int, 0, keys.Len())
	for i, at := range keys.EventDateTime {
		if storable(at) { // an event that cannot be stored was never inserted
			queried = append(queried, i)
		}
	}
	slices.SortFunc(queried, func(a, b int) int {
		return cmp.Or(cmp.Compare(keys.EventType.At(a), keys.EventType.At(b)), cmp.Compare(keys.EventDateTime[a], keys.EventDateTime[b]))
	})
	stored := make(map[string]struct{}, len(queried))
	for chunk := range slices.Chunk(queried, presentChunk) {
		// The result is one row, so that the client receives either all keys or an error.
		var found []string
		if err := s.conn.QueryRow(withPresenceSettings(ctx), s.presentStatement(keys, chunk)).Scan(&found); err != nil {
			return nil, s.classify(ctx, "check presence", err)
		}
		for _, identity := range found {
			stored[identity] = struct{}{}
		}
	}
	present := make([]bool, keys.Len())
	for _, i := range queried {
		_, present[i] = stored[identityOf(keys, i)]
	}
	return present, nil
}

// identitySQL and identityOf identify an event by the table's sorting key. The id is not
// sufficient, because a publisher may use an id twice.
const identitySQL = `concat(event_type, ' ', toString(toUnixTimestamp64Micro(event_date_time)), ' ', toString(event_id))`

func identityOf(keys *sink.Keys, i int) string {
	return keys.EventType.At(i) + " " + strconv.FormatInt(keys.EventDateTime[i], 10) + " " + keys.EventID[i].String()
}

// presentStatement returns the query for the keys at these indexes. The indexes are
// sorted by event type.
func (s *Sink) presentStatement(keys *sink.Keys, indexes []int) string {
	var q strings.Builder
	q.WriteString("SELECT groupUniqArray(" + identitySQL + ") FROM ")
	if s.cluster != "" {
		q.WriteString("clusterAllReplicas(" + quoteString(s.cluster) + ", currentDatabase(), " + s.table + ")")
	} else {
		q.WriteString(s.table)
	}

	first, last := int64(math.MaxInt64), int64(math.MinInt64)
	var types []string
	typesBytes := 0
	for _, i := range indexes {
		first, last = min(first, keys.EventDateTime[i]), max(last, keys.EventDateTime[i])
		if t := keys.EventType.At(i); len(types) == 0 || types[len(types)-1] != t {
			types = append(types, t)
			typesBytes += 2*len(t) + len("'', ") // the length if each byte is escaped
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
	for n, i := range indexes {
		if n > 0 {
			q.WriteByte(',')
		}
		q.WriteString("'" + keys.EventID[i].String() + "'")
	}
	q.WriteByte(')')
	return q.String()
}

func timeLiteral(micros int64) string {
	return fmt.Sprintf("toDateTime64('%s', 6, 'UTC')", time.UnixMicro(micros).UTC().Format("2006-01-02 15:04:05.000000"))
}
