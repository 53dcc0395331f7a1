package postgres

// Companion is SQL that inserts rows of one table together with the rows of another, in
// the same statement.
type Companion struct {
	// Condition is true for the ids of the rows to insert.
	Condition string
	// Insert is a statement that can read the ids of the inserted rows from a relation
	// named inserted.
	Insert string
	Args   []any
}
