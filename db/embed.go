// Package db embeds the migrations of both databases, so that a program brings the
// schema that it needs. They are in goose's format.
package db

import (
	"embed"
	"io/fs"
)

//go:embed postgres/outbox/*.sql postgres/users/*.sql clickhouse/*.sql
var files embed.FS

// The sets of migrations, each in the root of its file system.
var (
	// Outbox has the tables of the outbox in PostgreSQL, which any application can
	// publish into. {schema} in it stands for the schema's name and a dot.
	Outbox = sub("postgres/outbox")
	// Users has the tables of the API in PostgreSQL. {schema} is as in Outbox.
	Users = sub("postgres/users")
	// ClickHouse is a set of templates: pkg/sink/clickhouse puts in the names of the
	// table and of the cluster.
	ClickHouse = sub("clickhouse")
)

func sub(folder string) fs.FS {
	tree, err := fs.Sub(files, folder)
	if err != nil {
		panic(err) // the folder's name is not a valid path
	}
	return tree
}
