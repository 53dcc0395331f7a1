package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// key is a configuration key.
type key struct {
	name     string // section.key
	usage    string // for the help and docs/configuration.md
	fallback string // the default in the format of the file
	required bool   // the value must not be empty

	// mask returns the value without its secrets. It is nil if the value has no
	// secrets.
	mask func(value string) string

	// set parses, checks and stores a value. Its error follows the name of the key
	// and contains no secrets.
	set func(value string) error
	// get returns the stored value in the format of the file.
	get func() any
}

// variable returns the name of the environment variable.
func (k key) variable() string {
	return variablePrefix + strings.ToUpper(strings.ReplaceAll(k.name, ".", "_"))
}

// fileVariable returns the name of the environment variable with the path of a file that
// has the value.
func (k key) fileVariable() string { return k.variable() + "_FILE" }

const variablePrefix = "DIEHARD_"

// flag returns the name of the flag.
func (k key) flag() string {
	return strings.NewReplacer(".", "-", "_", "-").Replace(k.name)
}

func required(k key) key { k.required = true; return k }

func secret(mask func(string) string, k key) key { k.mask = mask; return k }

func text(name string, value *string, fallback, usage string, check func(string) error) key {
	return key{
		name: name, usage: usage, fallback: fallback,
		set: func(given string) error { *value = given; return check(given) },
		get: func() any { return *value },
	}
}

func address(name string, value *string, fallback, usage string) key {
	return text(name, value, fallback, usage, isAddress)
}

func integer(name string, value *int, fallback string, least, most int, usage string) key {
	return key{
		name: name, usage: usage, fallback: fallback,
		set: func(given string) (err error) {
			if *value, err = strconv.Atoi(given); err != nil {
				return fmt.Errorf("is %q, which is not a whole number", given)
			}
			return within(*value, least, most, strconv.Itoa)
		},
		get: func() any { return *value },
	}
}

func size(name string, value *int64, fallback string, least, most int64, usage string) key {
	return key{
		name: name, usage: usage, fallback: fallback,
		set: func(given string) (err error) {
			if *value, err = parseSize(given); err != nil {
				return err
			}
			return within(*value, least, most, formatSize)
		},
		get: func() any { return formatSize(*value) },
	}
}

func duration(name string, value *time.Duration, fallback string, least, most time.Duration, usage string) key {
	return key{
		name: name, usage: usage, fallback: fallback,
		set: func(given string) (err error) {
			if *value, err = time.ParseDuration(given); err != nil {
				return fmt.Errorf("is %q, which is not a duration such as 250ms, 5s or 1m30s", given)
			}
			return within(*value, least, most, formatDuration)
		},
		get: func() any { return formatDuration(*value) },
	}
}

func fraction(name string, value *float64, fallback, usage string) key {
	return number(name, value, fallback, 0, 1, usage)
}

func number(name string, value *float64, fallback string, least, most float64, usage string) key {
	return key{
		name: name, usage: usage, fallback: fallback,
		set: func(given string) (err error) {
			if *value, err = strconv.ParseFloat(given, 64); err != nil || math.IsNaN(*value) {
				return fmt.Errorf("is %q, which is not a number", given)
			}
			return within(*value, least, most, func(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) })
		},
		get: func() any { return *value },
	}
}

// list returns a key for comma-separated values. parse parses one value. It also
// receives the earlier values.
func list[T any](name string, values *[]T, parse func(text string, others []T) (T, error), format func(T) string, usage string) key {
	return key{
		name: name, usage: usage,
		set: func(given string) error {
			*values = nil
			for text := range strings.SplitSeq(given, ",") {
				if text = strings.TrimSpace(text); text == "" {
					continue
				}
				value, err := parse(text, *values)
				if err != nil {
					return err
				}
				*values = append(*values, value)
			}
			return nil
		},
		get: func() any {
			texts := make([]string, len(*values))
			for i, value := range *values {
				texts[i] = format(value)
			}
			return strings.Join(texts, ",")
		},
	}
}

func within[T int | int64 | float64 | time.Duration](value, least, most T, format func(T) string) error {
	if value < least || value > most {
		return fmt.Errorf("is %s, must be from %s to %s", format(value), format(least), format(most))
	}
	return nil
}

var sizeUnits = []struct {
	name  string
	bytes int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}, {"", 1}}

// parseSize parses a number of bytes: a whole number with an optional unit.
func parseSize(text string) (int64, error) {
	for _, unit := range sizeUnits {
		number, ok := strings.CutSuffix(text, unit.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
		if err != nil || n < 0 || n > math.MaxInt64/unit.bytes {
			break
		}
		return n * unit.bytes, nil
	}
	return 0, fmt.Errorf("is %q, which is not a size such as 1048576, 64KiB, 32MiB or 1GiB", text)
}

func formatSize(bytes int64) string {
	for _, unit := range sizeUnits {
		if unit.bytes > 1 && bytes > 0 && bytes%unit.bytes == 0 {
			return strconv.FormatInt(bytes/unit.bytes, 10) + unit.name
		}
	}
	return strconv.FormatInt(bytes, 10)
}

// formatDuration omits trailing units that are zero: 2m, not 2m0s.
func formatDuration(d time.Duration) string {
	text := d.String()
	if short, ok := strings.CutSuffix(text, "m0s"); ok {
		text = short + "m"
	}
	if short, ok := strings.CutSuffix(text, "h0m"); ok {
		text = short + "h"
	}
	return text
}
