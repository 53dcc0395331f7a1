// Package input reads request bodies and queries strictly. A body is an I-JSON object
// without unknown members. A query has no unknown parameters. The package reports all
// invalid values of a request at once. docs/input.md lists the responses.
package input

import (
	"iter"
	"slices"
	"strings"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

// BrokenRule is a rule of the use cases that a value breaks.
type BrokenRule struct {
	// Name is the member or parameter that has the value.
	Name string
	// Reason completes a sentence that begins with the name.
	Reason string
}

// findings are the invalid values of an Object or a Query.
type findings struct {
	invalid []problem.Value
	refused map[string]bool // by name
	place   func(name, detail string) problem.Value
}

// maxPlaceBytes limits the names in a response. A client can send names of megabytes.
const maxPlaceBytes = 128

// short returns the pointer, or the pointer to the whole body if it is too long.
func short(pointer jsontext.Pointer) string {
	if len(pointer) > maxPlaceBytes {
		return ""
	}
	return string(pointer)
}

// prefix returns the beginning of a long name.
func prefix(name string) string { return strings.ToValidUTF8(name[:32], "") + "…" }

// Refuse records that the value with the name is invalid.
func (f *findings) Refuse(name, detail string) {
	if f.refused == nil {
		f.refused = make(map[string]bool)
	}
	f.refused[name] = true
	f.invalid = append(f.invalid, f.place(name, detail))
}

// Place returns a problem.Value for the value with the name.
func (f *findings) Place(name, detail string) problem.Value { return f.place(name, detail) }

// check returns the findings as a problem, or nil without findings. Before that, it adds
// the unknown names to the findings. It also adds each broken rule, unless the value has
// a finding already.
func (f *findings) check(broken []BrokenRule, unknown iter.Seq[string], isUnknown string) error {
	for _, rule := range broken {
		if !f.refused[rule.Name] {
			f.Refuse(rule.Name, rule.Reason)
		}
	}
	for _, name := range slices.Sorted(unknown) {
		f.Refuse(name, isUnknown)
	}
	if len(f.invalid) == 0 {
		return nil
	}
	return problem.Invalid(f.invalid...)
}
