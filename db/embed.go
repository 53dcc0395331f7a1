// Package db embeds the migrations of both databases, in goose's format.
package db

import (
	"embed"
	"io/fs"
)

//go:embed postgres/outbox/*.sql postgres/users/*.sql clickhouse/*.sql
var files embed.FS

// The sets of migrations. The files are in the root of each file system.
var (
	// Outbox creates the tables of the outbox in PostgreSQL. Package postgres replaces
	// {schema} by the quoted name of the schema and a dot.
	Outbox = sub("postgres/outbox")
	// Users creates the tables of the API in PostgreSQL. It uses {schema} in the same way
	// as Outbox.
	Users = sub("postgres/users")
	// ClickHouse is a set of templates. pkg/sink/clickhouse fills in the names of the
	// table and the cluster.
	ClickHouse = sub("clickhouse")
)

func sub(folder string) fs.FS {
	tree, err := fs.Sub(files, folder)
	if err != nil {
		panic(err) // folder is not a valid path
	}
	return tree
}
