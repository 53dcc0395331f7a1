package status

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// Count returns a number for people: 12, 9,999, 120,000 or 1.2 million.
func Count(n int64) string {
	const million = 1_000_000
	if n >= million {
		return strconv.FormatFloat(float64(n)/million, 'f', 1, 64) + " million"
	}
	text := strconv.FormatInt(n, 10)
	if len(text) > 3 {
		text = text[:len(text)-3] + "," + text[len(text)-3:]
	}
	return text
}

// Duration returns a duration for people, with one or two units: 80 ms, 12 s, 4 min 10 s,
// 3 h 12 min, 2 d 5 h.
func Duration(d time.Duration) string {
	const day = 24 * time.Hour
	two := func(n time.Duration, unit string, rest time.Duration, restUnit string) string {
		if rest == 0 {
			return fmt.Sprintf("%d %s", n, unit)
		}
		return fmt.Sprintf("%d %s %d %s", n, unit, rest, restUnit)
	}
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < time.Hour:
		return two(d/time.Minute, "min", d%time.Minute/time.Second, "s")
	case d < day:
		return two(d/time.Hour, "h", d%time.Hour/time.Minute, "min")
	}
	return two(d/day, "d", d%day/time.Hour, "h")
}

// Bytes returns a size for people: 812 B, 1.2 MB.
func Bytes(n int64) string {
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n), ""
	for _, unit = range []string{"kB", "MB", "GB", "TB", "PB"} {
		value /= 1000
		if value < 999.95 {
			break
		}
	}
	return strconv.FormatFloat(value, 'f', 1, 64) + " " + unit
}

// At returns a time for people: the time of day in UTC, and the date if it is not today.
func At(at time.Time) string {
	at = at.UTC()
	if time.Now().UTC().Format(time.DateOnly) == at.Format(time.DateOnly) {
		return at.Format("15:04:05 UTC")
	}
	return at.Format("2006-01-02 15:04:05 UTC")
}

// ParseTime parses a time as operators write it: RFC 3339, or an age such as 24h.
func ParseTime(text string) (time.Time, error) {
	if at, err := time.Parse(time.RFC3339, text); err == nil {
		return at, nil
	}
	ago, err := time.ParseDuration(text)
	if err != nil || ago < 0 {
		return time.Time{}, errors.New("must be a time such as 2026-11-24T03:00:00Z or an age such as 24h")
	}
	return time.Now().Add(-ago), nil
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return Count(int64(n)) + " " + many
}

// maxDeadLetters is the number of dead letters from which the store does not count.
const maxDeadLetters = 10_000

func atLeast(n int64, one, many string) string {
	if n >= maxDeadLetters {
		return Count(maxDeadLetters) + " or more " + many
	}
	return plural(int(n), one, many)
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func orEmpty(value string) string {
	if value == "" {
		return "empty"
	}
	return value
}

// oneLine returns an error as a part of a sentence, without control characters.
func oneLine(text string) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
	const most = 400
	if runes := []rune(text); len(runes) > most {
		text = string(runes[:most-1]) + "…"
	}
	return strings.TrimSuffix(text, ".")
}

func differingKeys(configurations [][]store.Member) []string {
	keys := map[string]bool{}
	for _, group := range configurations {
		for key := range group[0].Settings {
			keys[key] = true
		}
	}
	return slices.DeleteFunc(slices.Sorted(maps.Keys(keys)), func(key string) bool {
		return !slices.ContainsFunc(configurations, func(group []store.Member) bool {
			return group[0].Settings[key] != configurations[0][0].Settings[key]
		})
	})
}
