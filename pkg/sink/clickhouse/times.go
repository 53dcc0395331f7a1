package clickhouse

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// timeRange is the range of DateTime64(6) in microseconds since 1970. For a time outside
// of this range, the server stores a different time and returns no error.
//
// https://clickhouse.com/docs/sql-reference/data-types/datetime64
type timeRange struct{ first, last int64 }

// timeRanges are the ranges of the server's versions, the largest first.
var timeRanges = []timeRange{yearsFrom(1, 9999), yearsFrom(1900, 2299)}

func yearsFrom(first, last int) timeRange {
	return timeRange{
		time.Date(first, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro(),
		time.Date(last, 12, 31, 23, 59, 59, 999_999_000, time.UTC).UnixMicro(),
	}
}

func (r timeRange) holds(micros int64) bool { return micros >= r.first && micros <= r.last }

// outside returns the condition for times outside of the range.
func (r timeRange) outside() string {
	return "(event_date_time < " + timeLiteral(r.first) + " OR event_date_time > " + timeLiteral(r.last) + ")"
}

// String returns the range for messages.
func (r timeRange) String() string {
	return fmt.Sprintf("the years %d to %d", time.UnixMicro(r.first).UTC().Year(), time.UnixMicro(r.last).UTC().Year())
}

// probeTimes returns the largest range that the server stores unchanged. The server
// converts the limits of each range to text and back, and calculates their months,
// because the migrations partition the table by month.
func (s *Sink) probeTimes(ctx context.Context) (timeRange, error) {
	var converted, expected []string
	for _, r := range timeRanges {
		for _, at := range []int64{r.first, r.last} {
			t := time.UnixMicro(at).UTC()
			stored := fmt.Sprintf("fromUnixTimestamp64Micro(toInt64(%d), 'UTC')", at)
			converted = append(converted, fmt.Sprintf("concat(toString(toUnixTimestamp64Micro(%s)), ' ', toString(%s), ' ', toString(toYYYYMM(%s)))",
				timeLiteral(at), stored, stored))
			expected = append(expected, fmt.Sprintf("%d %s %d", at, t.Format(timeFormat), 100*t.Year()+int(t.Month())))
		}
	}
	smallest := timeRanges[len(timeRanges)-1]
	var results []string
	if err := s.conn.QueryRow(ctx, "SELECT ["+strings.Join(converted, ", ")+"]").Scan(&results); err != nil {
		err = s.classify(ctx, "read the server's range of times", err)
		if _, refused := errors.AsType[*serverError](err); refused { // the server refuses times outside of its range
			return smallest, nil
		}
		return timeRange{}, err
	}
	for i, r := range timeRanges {
		if len(results) == len(expected) && results[2*i] == expected[2*i] && results[2*i+1] == expected[2*i+1] {
			return r, nil
		}
	}
	return smallest, nil
}

const timeFormat = "2006-01-02 15:04:05.000000"

func timeLiteral(micros int64) string {
	return fmt.Sprintf("toDateTime64('%s', 6, 'UTC')", time.UnixMicro(micros).UTC().Format(timeFormat))
}
