// Package db embeds the migrations of both databases, so that a binary brings
// the schema that it needs.
package db

import (
	"embed"
	"io/fs"
)

//go:embed postgres/*.sql clickhouse/*.sql
var files embed.FS

// Postgres holds PostgreSQL's migrations in its root, in goose's format.
var Postgres = sub("postgres")

// ClickHouse holds ClickHouse's migrations in its root, in goose's format once
// pkg/sink/clickhouse has put the table's and the cluster's names in.
var ClickHouse = sub("clickhouse")

func sub(folder string) fs.FS {
	tree, err := fs.Sub(files, folder)
	if err != nil {
		panic(err) // the folder's name is not a valid path
	}
	return tree
}
