package postgres

import (
	"strings"
	"sync"

	"github.com/lib/pq"
)

// InSchema returns a function that adds the schema to a statement. It replaces
// {schema} with the quoted name and a dot, and {schema_literal} with the same text
// escaped for a string literal. If schema is empty, the session's search_path applies.
//
// The function caches every statement, so use it for constant statements only. It is
// safe for concurrent use.
func InSchema(schema string) func(statement string) string {
	prefix := ""
	if schema != "" {
		prefix = pq.QuoteIdentifier(schema) + "."
	}
	replacer := strings.NewReplacer(
		"{schema}", prefix,
		"{schema_literal}", strings.ReplaceAll(prefix, "'", "''"),
	)
	var known sync.Map // from statement to result
	return func(statement string) string {
		if found, ok := known.Load(statement); ok {
			return found.(string) //nolint:forcetypeassert // nothing else is stored
		}
		found := replacer.Replace(statement)
		known.Store(statement, found)
		return found
	}
}
