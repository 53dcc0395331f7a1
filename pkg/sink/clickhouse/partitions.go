package clickhouse

import (
	"context"
	"database/sql"
	"encoding/hex"
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Partitions implements sink.Sink. The server calculates the partitions.
func (s *Sink) Partitions(ctx context.Context, keys *sink.Keys) ([]int, error) {
	facts, err := s.facts(ctx)
	if err != nil {
		return nil, err
	}
	resolving, err := s.resolving(ctx)
	if err != nil {
		return nil, err
	}
	p, err := s.readPlace(resolving)
	if err != nil {
		return nil, err
	}
	numbers := make([]int, keys.Len())
	if p.partitionKey == "" || p.partitionKey == "tuple()" {
		return numbers, nil
	}
	for i := range numbers {
		numbers[i] = i
	}
	located := make([]int, 0, keys.Len())
	for i, at := range keys.EventDateTime {
		if facts.times.holds(at) { // an event that cannot be stored is in no partition
			located = append(located, i)
		}
	}
	ids, err := p.locate(keys, located)
	if err != nil || ids == nil {
		return numbers, err
	}
	first := map[string]int{}
	for n, i := range located {
		if _, ok := first[ids[n]]; !ok {
			first[ids[n]] = i
		}
		numbers[i] = first[ids[n]]
	}
	return numbers, nil
}

// place is the definition of the table.
type place struct {
	*Sink

	context      context.Context //nolint:containedctx // has the settings of all queries about the place
	database     string
	partitionKey string
	engine       string
	definition   string
	keyColumns   map[string]string // the columns of the partition key with their types
}

// readPlace reads the definition of the table. resolving has the settings of the resolve
// step.
func (s *Sink) readPlace(resolving context.Context) (*place, error) {
	p := &place{Sink: s, context: resolving}
	var names, types []string
	err := s.conn.QueryRow(resolving, "SELECT currentDatabase(), partition_key, engine, engine_full FROM system.tables"+
		" WHERE database = currentDatabase() AND name = "+quoteString(s.name)).Scan(&p.database, &p.partitionKey, &p.engine, &p.definition)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, s.tableMissing()
	}
	if err == nil {
		err = s.conn.QueryRow(resolving, "SELECT groupArray(name), groupArray(type) FROM system.columns"+
			" WHERE database = currentDatabase() AND table = "+quoteString(s.name)+" AND is_in_partition_key").Scan(&names, &types)
	}
	if err != nil {
		return nil, s.classify(resolving, "read the table's partition key", err)
	}
	p.keyColumns = make(map[string]string, len(names))
	for i, name := range names {
		p.keyColumns[name] = types[i]
	}
	return p, nil
}

// isDetermined returns whether the table has a partition key, and the key's columns are in
// sink.Keys.
func (p *place) isDetermined() bool {
	for name, typ := range p.keyColumns {
		switch name {
		case "event_id", "event_type":
		case "event_date_time":
			if !strings.Contains(typ, "'") { // the partition depends on the server's time zone
				return false
			}
		default:
			return false
		}
	}
	return len(p.keyColumns) > 0
}

// unknownIdentifier is the error code of an unknown column.
const unknownIdentifier = 47

// keysBytes bounds the keys of a statement.
const keysBytes = 128 << 10

// locate returns the id of the partition of each key at these indexes, or nil if the keys
// do not determine their partitions. The server calculates each partition once for equal
// values of the key's columns.
func (p *place) locate(keys *sink.Keys, indexes []int) ([]string, error) {
	if !p.isDetermined() {
		return nil, nil
	}
	var (
		tuples  []string
		numbers = make([]int, len(indexes)) // the number of each key's tuple
		known   = map[string]int{}
	)
	for n, i := range indexes {
		tuple := p.tuple(keys, i)
		number, ok := known[tuple]
		if !ok {
			number = len(tuples)
			known[tuple] = number
			tuples = append(tuples, tuple)
		}
		numbers[n] = number
	}
	located := make([]string, len(tuples))
	for first := 0; first < len(tuples); {
		list, after := listOf(tuples, first)
		err := p.locateList(list, located)
		if hasCode(err, unknownIdentifier) {
			return nil, nil // the key uses a subcolumn, and system.columns does not say so
		}
		if err != nil {
			return nil, err
		}
		first = after
	}
	ids := make([]string, len(indexes))
	for n, number := range numbers {
		ids[n] = located[number]
	}
	return ids, nil
}

// locateList sets the ids of the partitions for a list of numbered tuples.
func (p *place) locateList(list string, located []string) error {
	arguments := p.partitionKey
	if !isParenthesized(arguments) {
		arguments = "(" + arguments + ")"
	}
	casts := make([]string, 0, len(p.keyColumns))
	for name, typ := range p.keyColumns {
		casts = append(casts, "CAST("+keyFields[name].sql+" AS "+typ+") AS "+name)
	}
	slices.Sort(casts)
	var (
		numbers []uint32
		ids     []string
	)
	err := p.conn.QueryRow(p.context, "SELECT groupArray(number), groupArray(partitionId"+arguments+") FROM (SELECT toUInt32(key[1]) AS number, "+strings.Join(casts, ", ")+
		" FROM (SELECT splitByChar(' ', arrayJoin(splitByChar(',', '"+list+"'))) AS key))").Scan(&numbers, &ids)
	if err != nil {
		return p.classify(p.context, "calculate the partitions of the batch", err)
	}
	for i, number := range numbers {
		located[number] = ids[i]
	}
	return nil
}

// keyFields are the fields of a tuple by the column that they determine: the SQL that reads
// a field, and the text of the field.
var keyFields = map[string]struct {
	sql  string
	text func(keys *sink.Keys, i int) string
}{
	"event_id":        {"toUUID(key[2])", func(keys *sink.Keys, i int) string { return keys.EventID[i].String() }},
	"event_type":      {"unhex(key[3])", func(keys *sink.Keys, i int) string { return hex.EncodeToString([]byte(keys.EventType.At(i))) }},
	"event_date_time": {"fromUnixTimestamp64Micro(toInt64(key[4]), 'UTC')", func(keys *sink.Keys, i int) string { return strconv.FormatInt(keys.EventDateTime[i], 10) }},
}

// tuple returns the texts of the partition key's columns.
func (p *place) tuple(keys *sink.Keys, i int) string {
	texts := []string{"", "", ""}
	for at, name := range []string{"event_id", "event_type", "event_date_time"} {
		if _, ok := p.keyColumns[name]; ok {
			texts[at] = keyFields[name].text(keys, i)
		}
	}
	return strings.Join(texts, " ")
}

// listOf returns a list of the tuples from first to before after, each with its number.
// The list has at most keysBytes, or one tuple.
func listOf(tuples []string, first int) (list string, after int) {
	var l strings.Builder
	for after = first; after < len(tuples); after++ {
		tuple := strconv.Itoa(after) + " " + tuples[after]
		if after > first {
			if l.Len()+len(tuple) >= keysBytes {
				break
			}
			l.WriteByte(',')
		}
		l.WriteString(tuple)
	}
	return l.String(), after
}

// isParenthesized returns whether a pair of parentheses encloses the complete expression.
func isParenthesized(expression string) bool {
	if !strings.HasPrefix(expression, "(") {
		return false
	}
	depth, quote := 0, byte(0)
	for i := 0; i < len(expression); i++ {
		switch c := expression[i]; {
		case quote != 0 && c == '\\':
			i++
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '\'' || c == '`' || c == '"':
			quote = c
		case c == '(':
			depth++
		case c == ')':
			depth--
			if depth == 0 {
				return i == len(expression)-1
			}
		}
	}
	return false
}
