package db

import (
	"fmt"
	"io/fs"
	"strings"

	"github.com/pressly/goose/v3"
)

// Version is a migration of a set.
type Version struct {
	Number int64
	// SQL contains the statements of the Up part, without goose's annotations.
	SQL string
}

// Versions returns the migrations of a set in order.
func Versions(files fs.FS) ([]Version, error) {
	names, err := fs.Glob(files, "*.sql") // sorted
	if err != nil {
		return nil, fmt.Errorf("read the migrations: %w", err)
	}
	versions := make([]Version, len(names))
	for i, name := range names {
		number, err := goose.NumericComponent(name)
		if err != nil {
			return nil, fmt.Errorf("read the migrations: %w", err)
		}
		content, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, fmt.Errorf("read the migrations: %w", err)
		}
		versions[i] = Version{Number: number, SQL: up(string(content))}
	}
	return versions, nil
}

func up(migration string) string {
	migration, _, _ = strings.Cut(migration, "\n-- +goose Down")
	var kept []string
	for line := range strings.SplitSeq(migration, "\n") {
		if !strings.HasPrefix(line, "-- +goose ") {
			kept = append(kept, line)
		}
	}
	return strings.TrimSpace(strings.Join(kept, "\n"))
}
