package clickhouse

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// checkVisibility returns a *sink.BlindError unless the session sees every row of every
// part that may contain one of the keys at these indexes. A row policy, for example, can
// hide rows. ClickHouse then returns the other rows without an error.
//
// For each active part, the check compares the number of rows that the session counts
// with the number in system.parts. A table without parts hides nothing. The partition of
// each key limits the check to the parts of these partitions.
func (s *Sink) checkVisibility(ctx context.Context, keys *sink.Keys, indexes []int) error {
	resolving, err := s.resolving(ctx)
	if err != nil {
		return err
	}
	v := &visibility{seen: map[string]struct{}{}}
	if v.place, err = s.readPlace(resolving); err != nil {
		return err
	}
	if v.partitions, err = v.locate(keys, indexes); err != nil {
		return err
	}
	slices.Sort(v.partitions)
	v.partitions = slices.Compact(v.partitions)
	if err := v.checkWindow(); err != nil {
		return err
	}
	parts, err := v.parts()
	if err != nil {
		return err
	}
	for round := 1; ; round++ {
		hidden, err := v.count(parts)
		if err != nil || len(hidden) == 0 {
			return err
		}
		// A merge may have replaced a part before the session counted it. The part that
		// contains its rows is then compared in the next round.
		active, err := v.parts()
		if err != nil {
			return err
		}
		for _, p := range hidden {
			if i := slices.IndexFunc(active, p.is); i >= 0 && active[i].rows == p.rows {
				return s.blind(p)
			}
		}
		if round == maxRounds {
			return s.blind(hidden[0])
		}
		parts = slices.DeleteFunc(active, func(p part) bool {
			_, seen := v.seen[p.name]
			return seen || !slices.ContainsFunc(hidden, p.replaces)
		})
	}
}

const (
	// maxRounds bounds the rounds of a check while merges replace parts. In each round a
	// part must be replaced between two queries.
	maxRounds = 20
	// pieceRows bounds the rows that one statement counts, unless one part has more rows.
	pieceRows = 500_000_000
	// pieceParts bounds the parts of a statement, and thereby its length.
	pieceParts = 2_000
)

// visibility is one visibility check.
type visibility struct {
	*place

	partitions []string // ids; nil means all partitions
	seen       map[string]struct{}
}

// part is an active part. On a cluster, rows is the sum over all replicas that have the
// part.
type part struct {
	name, partition string
	first, last     int64 // block numbers
	rows            uint64
	counted         uint64 // the rows that the session sees
}

func (p part) is(other part) bool { return p.name == other.name }

// replaces returns whether p contains the blocks of another part, as the result of a
// merge or a mutation.
func (p part) replaces(other part) bool {
	return p.partition == other.partition && p.first <= other.first && p.last >= other.last
}

// checkWindow returns a *sink.MisconfiguredError if the table does not remember the tokens
// of all partitions of the keys and of other blocks. An insert has one block in each
// partition, so an insert of more partitions than the window pushes out its own tokens.
// LeastWindow includes two partitions.
func (v *visibility) checkWindow() error {
	match := family.FindStringSubmatch(v.engine)
	if match == nil {
		return nil // Check refuses the table
	}
	value, err := v.readTableSetting(v.context, v.definition, match[1], windowSetting(match[1]))
	if err != nil {
		return err
	}
	window, err := strconv.ParseInt(value, 10, 64)
	if least := int64(LeastWindow + max(0, len(v.partitions)-2)); err == nil && window < least {
		return &sink.MisconfiguredError{
			Problem: fmt.Sprintf("the batch has events of %d partitions, and the table %s remembers %d tokens: an insert that begins late may double them",
				len(v.partitions), v.table, window),
			Remedy: fmt.Sprintf("ALTER TABLE %s%s MODIFY SETTING %s = %d", v.table, onCluster(v.cluster), windowSetting(match[1]), 2*least),
		}
	}
	return nil
}

// parts returns the active parts of the partitions that have rows. It reads no patch
// parts: they change rows of other parts, and have no rows of the table.
func (v *visibility) parts() ([]part, error) {
	from, where := "system.parts", ""
	if v.cluster != "" {
		from = "clusterAllReplicas(" + quoteString(v.cluster) + ", system.parts)"
	}
	if v.partitions != nil {
		where = " AND partition_id IN (" + quoteStrings(v.partitions) + ")"
	}
	var (
		names, partitions []string
		first, last       []int64
		rows              []uint64
	)
	err := v.conn.QueryRow(v.context, "SELECT groupArray(name), groupArray(partition_id), groupArray(min_block), groupArray(max_block), groupArray(sum_rows)"+
		" FROM (SELECT name, partition_id, any(min_block_number) AS min_block, any(max_block_number) AS max_block, sum(rows) AS sum_rows FROM "+from+
		" WHERE database = "+quoteString(v.database)+" AND table = "+quoteString(v.name)+
		" AND active AND rows > 0 AND NOT startsWith(partition_id, 'patch-')"+where+" GROUP BY name, partition_id)").
		Scan(&names, &partitions, &first, &last, &rows)
	if err != nil {
		return nil, v.classify(v.context, "read the table's parts", err)
	}
	parts := make([]part, len(names))
	for i := range parts {
		parts[i] = part{name: names[i], partition: partitions[i], first: first[i], last: last[i], rows: rows[i]}
	}
	return parts, nil
}

// count counts the rows of the parts. It returns the parts that have more rows than the
// session counts, or fewer. The latter is possible on a cluster, if a replica has fetched
// the part in the meantime.
func (v *visibility) count(parts []part) (hidden []part, err error) {
	for len(parts) > 0 {
		n, rows := 0, uint64(0)
		for n < len(parts) && n < pieceParts && (n == 0 || rows+parts[n].rows <= pieceRows) {
			rows += parts[n].rows
			n++
		}
		counted, err := v.countPiece(parts[:n])
		if err != nil {
			return nil, err
		}
		for _, p := range parts[:n] {
			if counted[p.name] == p.rows {
				v.seen[p.name] = struct{}{}
			} else {
				p.counted = counted[p.name]
				hidden = append(hidden, p)
			}
		}
		parts = parts[n:]
	}
	return hidden, nil
}

func (v *visibility) countPiece(parts []part) (map[string]uint64, error) {
	names := make([]string, len(parts))
	for i, p := range parts {
		names[i] = p.name
	}
	var (
		found []string
		rows  []uint64
	)
	err := v.conn.QueryRow(v.context, "SELECT groupArray(toString(name)), groupArray(rows)"+
		" FROM (SELECT _part AS name, count() AS rows FROM "+v.onReplicas()+
		" WHERE _part IN ("+quoteStrings(names)+") GROUP BY name)").Scan(&found, &rows)
	if err != nil {
		return nil, v.classify(v.context, "count the rows of the table's parts", err)
	}
	counted := make(map[string]uint64, len(found))
	for i, name := range found {
		counted[name] = rows[i]
	}
	return counted, nil
}

// blind returns the error for a part whose rows are not all visible.
func (s *Sink) blind(p part) error {
	return &sink.BlindError{
		Problem: fmt.Sprintf("the clickhouse user %s sees %d of %d rows in the part %s of the table %s, so a presence check may miss events",
			quoteIdentifier(s.user), p.counted, p.rows, p.name, s.table),
		Remedy: "let the user see every row (SHOW ROW POLICIES lists what hides rows): CREATE ROW POLICY diehard" + onCluster(s.cluster) +
			" ON " + s.table + " USING 1 TO " + quoteIdentifier(s.user),
	}
}

func quoteStrings(values []string) string {
	quoted := make([]string, len(values))
	for i, value := range values {
		quoted[i] = quoteString(value)
	}
	return strings.Join(quoted, ", ")
}
