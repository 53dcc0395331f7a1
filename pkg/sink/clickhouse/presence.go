package clickhouse

import (
	"cmp"
	"context"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// InFlight implements sink.Sink. On a cluster it queries every replica. If a replica does
// not respond, InFlight returns an error, because the replica may be executing the
// insert.
func (s *Sink) InFlight(ctx context.Context, token string) (bool, error) {
	processes := "system.processes"
	if s.cluster != "" {
		processes = "clusterAllReplicas(" + quoteString(s.cluster) + ", system.processes)"
	}
	resolving, err := s.resolving(ctx)
	if err != nil {
		return false, err
	}
	var inserts uint64
	err = s.conn.QueryRow(resolving,
		"SELECT count() FROM "+processes+" WHERE Settings['insert_deduplication_token'] = "+quoteString(token),
	).Scan(&inserts)
	if err != nil {
		return false, s.classify(ctx, "find inserts in flight", err)
	}
	return inserts > 0, nil
}

const (
	// A statement with presentChunk keys has 740 kB.
	presentChunk = 20_000
	// maxTypesBytes bounds the bytes of event types in a statement. Above the bound, the
	// statement limits its read by time only.
	maxTypesBytes = 32 << 10
)

// Present implements sink.Sink. On a cluster it queries every replica, because a row
// may not be replicated yet.
//
// If it does not find an event, it checks that the session sees every row of the event's
// partition. Then it queries the event again: between the first query and the check, an
// operator may have removed a row policy that had hidden the event.
//
// An event outside of the server's range of times is queried as well. A newer version of
// the server, or a newer replica, may have stored it. The server then compares the stored
// number, but cannot calculate the event's partition. So the visibility of this partition
// is not checked.
func (s *Sink) Present(ctx context.Context, keys *sink.Keys) ([]bool, error) {
	facts, err := s.facts(ctx)
	if err != nil {
		return nil, err
	}
	inside, outside := make([]int, 0, keys.Len()), []int(nil)
	for i, at := range keys.EventDateTime {
		if facts.times.holds(at) {
			inside = append(inside, i)
		} else {
			outside = append(outside, i)
		}
	}
	for _, indexes := range [][]int{inside, outside} {
		slices.SortFunc(indexes, func(a, b int) int {
			return cmp.Or(cmp.Compare(keys.EventType.At(a), keys.EventType.At(b)), cmp.Compare(keys.EventDateTime[a], keys.EventDateTime[b]))
		})
	}
	present := make([]bool, keys.Len())
	if _, err := s.find(ctx, keys, outside, facts.times.outside(), present); err != nil {
		return nil, err
	}
	absent, err := s.find(ctx, keys, inside, "", present)
	if err != nil || len(absent) == 0 {
		return present, err
	}
	if err := s.checkVisibility(ctx, keys, absent); err != nil {
		return nil, err
	}
	if _, err := s.find(ctx, keys, absent, "", present); err != nil {
		return nil, err
	}
	return present, nil
}

// Undecided implements sink.Sink. If Keeper fails during a commit, the insert ends with the
// error 319. The replica then keeps the part, asks Keeper after 300 seconds, and removes the
// part if Keeper does not know it.
func (s *Sink) Undecided() bool { return s.cluster != "" }

// find sets present for the keys at these indexes that it finds, and returns the others.
// The indexes are sorted by event type and time. If period is empty, the times of the keys
// limit the read, and otherwise this condition.
//
// A statement has up to 20,000 keys of neighbouring types and times, because the table is
// sorted and partitioned by type and time. It reads without FINAL, because FINAL would
// merge rows.
func (s *Sink) find(ctx context.Context, keys *sink.Keys, indexes []int, period string, present []bool) (absent []int, err error) {
	if len(indexes) == 0 {
		return nil, nil
	}
	resolving, err := s.resolving(ctx)
	if err != nil {
		return nil, err
	}
	stored := make(map[string]struct{}, len(indexes))
	for chunk := range slices.Chunk(indexes, presentChunk) {
		// The result is one row, so that the client receives either all keys or an error.
		var found []string
		if err := s.conn.QueryRow(resolving, s.presentStatement(keys, chunk, period)).Scan(&found); err != nil {
			return nil, s.classify(ctx, "check presence", err)
		}
		for _, identity := range found {
			stored[identity] = struct{}{}
		}
	}
	for _, i := range indexes {
		if _, present[i] = stored[identityOf(keys, i)]; !present[i] {
			absent = append(absent, i)
		}
	}
	return absent, nil
}

// identitySQL and identityOf identify an event by the table's sorting key. The id is not
// sufficient, because a publisher may use an id twice.
const identitySQL = `concat(event_type, ' ', toString(toUnixTimestamp64Micro(event_date_time)), ' ', toString(event_id))`

func identityOf(keys *sink.Keys, i int) string {
	return keys.EventType.At(i) + " " + strconv.FormatInt(keys.EventDateTime[i], 10) + " " + keys.EventID[i].String()
}

// onReplicas returns the table on every replica, for FROM.
func (s *Sink) onReplicas() string {
	if s.cluster == "" {
		return s.table
	}
	return "clusterAllReplicas(" + quoteString(s.cluster) + ", currentDatabase(), " + s.table + ")"
}

// presentStatement returns the query for the keys at these indexes. The indexes are
// sorted by event type. The parameter period is as in find.
func (s *Sink) presentStatement(keys *sink.Keys, indexes []int, period string) string {
	var q strings.Builder
	q.WriteString("SELECT groupUniqArray(" + identitySQL + ") FROM " + s.onReplicas())

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
	if period == "" {
		period = "event_date_time BETWEEN " + timeLiteral(first) + " AND " + timeLiteral(last)
	}
	q.WriteString(" WHERE " + period)
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
	q.WriteString(" AND event_id IN (SELECT toUUID(arrayJoin(splitByChar(',', '")
	for n, i := range indexes {
		if n > 0 {
			q.WriteByte(',')
		}
		q.WriteString(keys.EventID[i].String())
	}
	q.WriteString("'))))")
	return q.String()
}
