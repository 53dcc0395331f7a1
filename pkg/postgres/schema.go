package postgres

import (
	"strings"
	"sync"

	"github.com/lib/pq"
)

// InSchema returns a function that puts the schema into a statement: it replaces
// each {schema} with the quoted name and a dot, and each {schema_literal} with the
// same for use within a string literal. An empty schema leaves the tables to the
// session's search_path.
//
// The function is for a program's constant statements: it keeps each that it was
// given. It is safe for concurrent use.
func InSchema(schema string) func(statement string) string {
	prefix := ""
	if schema != "" {
		prefix = pq.QuoteIdentifier(schema) + "."
	}
	replacer := strings.NewReplacer(
		"{schema}", prefix,
		"{schema_literal}", strings.ReplaceAll(prefix, "'", "''"),
	)
	var known sync.Map // by statement
	return func(statement string) string {
		if found, ok := known.Load(statement); ok {
			return found.(string) //nolint:forcetypeassert // nothing else is stored
		}
		found := replacer.Replace(statement)
		known.Store(statement, found)
		return found
	}
}
