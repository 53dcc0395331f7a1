package clickhouse

import (
	"context"
	"database/sql"
	"errors"
	"strings"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Destination implements sink.Sink. The identity of a table is its UUID. Replicas of a
// table may have different UUIDs, so the identity of a replicated table is its path in
// Keeper. A database of the old engine Ordinary has no UUIDs. The identity is then the
// UUID of the server with the table's name.
func (s *Sink) Destination(ctx context.Context) (string, error) {
	ctx, err := s.resolving(ctx)
	if err != nil {
		return "", err
	}
	var uuid, server, database, engine string
	err = s.conn.QueryRow(ctx, "SELECT toString(uuid), toString(serverUUID()), database, engine FROM system.tables"+
		" WHERE database = currentDatabase() AND name = "+quoteString(s.name)).Scan(&uuid, &server, &database, &engine)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", s.tableMissing()
	case err != nil:
		return "", s.classify(ctx, "read the table's identity", err)
	case strings.HasPrefix(engine, "Replicated"):
		return s.keeperPath(ctx)
	case uuid == "00000000-0000-0000-0000-000000000000":
		return "table " + database + "." + s.name + " of server " + server, nil
	default:
		return "table " + uuid, nil
	}
}

func (s *Sink) keeperPath(ctx context.Context) (string, error) {
	var path string
	err := s.conn.QueryRow(ctx, "SELECT zookeeper_path FROM system.replicas"+
		" WHERE database = currentDatabase() AND table = "+quoteString(s.name)).Scan(&path)
	if err == nil {
		return "replicated table " + path, nil
	}
	if err = s.classify(ctx, "read the table's path in Keeper", err); hasCode(err, accessDenied) {
		return "", &sink.MisconfiguredError{
			Problem: "the clickhouse user may not read system.replicas, which identifies the table",
			Remedy:  "GRANT SELECT ON system.replicas TO " + quoteIdentifier(s.user),
		}
	}
	return "", err
}
