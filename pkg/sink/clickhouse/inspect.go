package clickhouse

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	chgo "github.com/ClickHouse/clickhouse-go/v2"

	"github.com/diehard-outbox/diehard/pkg/checkup"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Names of the checks.
const (
	ConnectionCheck     = "clickhouse connection"
	TableCheck          = "clickhouse table"
	insertSettingsCheck = "clickhouse settings of inserts"
	engineCheck         = "clickhouse engine"
	tableSettingsCheck  = "clickhouse settings of the table"
	columnsCheck        = "clickhouse columns"
	insertCheck         = "clickhouse right to insert"
	presenceCheck       = "clickhouse right to check presence"
	processesCheck      = "clickhouse right to see running inserts"
)

// Load is how often a fleet inserts.
type Load struct {
	// FlushTimeout bounds the duration of an insert. Linger is the least time between two
	// partial batches.
	FlushTimeout, Linger time.Duration
}

// blocks returns the number of blocks that a fleet sends within the deadline of an insert.
// See LeastWindow.
func (l Load) blocks() float64 {
	const fullBatches, partitions = 10, 2
	return l.FlushTimeout.Seconds() * (fullBatches + partitions/l.Linger.Seconds())
}

// Checks returns the parts of Check for an operator. They also check the right to insert.
func (s *Sink) Checks(load Load) []checkup.Check {
	var t *table
	var placed string
	return checkup.WithRemedy("find the cause in the log of ClickHouse", []checkup.Check{
		{Name: ConnectionCheck, Run: s.inspectConnection},
		{Name: insertSettingsCheck, Needs: []string{ConnectionCheck}, Run: func(ctx context.Context) (string, error) {
			return "the server receives all settings of an insert", s.checkInsertSettings(ctx)
		}},
		{Name: TableCheck, Needs: []string{ConnectionCheck}, Run: func(ctx context.Context) (_ string, err error) {
			resolving, err := s.resolving(ctx)
			if err != nil {
				return "", err
			}
			if t, err = s.readTable(resolving); err != nil {
				return "", err
			}
			destination, err := s.Destination(ctx)
			return s.database + "." + s.name + " (" + destination + ")", err
		}},
		{Name: engineCheck, Needs: []string{TableCheck}, Run: func(context.Context) (_ string, err error) {
			placed, err = s.checkEngine(t)
			return t.engine + " ordered by (" + t.sortingKey + ")", err
		}},
		{Name: tableSettingsCheck, Needs: []string{engineCheck}, Run: func(ctx context.Context) (string, error) {
			resolving, err := s.resolving(ctx)
			if err != nil {
				return "", err
			}
			return s.inspectTableSettings(resolving, t.definition, placed, load)
		}},
		{Name: columnsCheck, Needs: []string{TableCheck}, Run: func(context.Context) (string, error) {
			return fmt.Sprintf("all %d columns store their values unchanged", len(columns)), s.checkColumns(t)
		}},
		{Name: insertCheck, Needs: []string{insertSettingsCheck, columnsCheck}, Run: func(ctx context.Context) (string, error) {
			return "INSERT on " + s.table, s.checkInsert(ctx)
		}},
		{Name: presenceCheck, Needs: []string{engineCheck, columnsCheck}, Run: func(ctx context.Context) (string, error) {
			return "SELECT on " + s.table + " and system.parts", s.checkPresence(ctx)
		}},
		{Name: processesCheck, Needs: []string{ConnectionCheck}, Run: func(ctx context.Context) (string, error) {
			on := "system.processes"
			if s.cluster != "" {
				on += " of every server of the cluster " + s.cluster
			}
			return "SELECT on " + on, s.checkProcesses(ctx)
		}},
	})
}

// inspectConnection describes the server, or each server if the DSN has several hosts.
func (s *Sink) inspectConnection(ctx context.Context) (string, error) {
	resolving, err := s.resolving(ctx)
	var version, user, database string
	if err == nil {
		err = s.conn.QueryRow(resolving, "SELECT version(), currentUser(), currentDatabase()").Scan(&version, &user, &database)
		if err != nil {
			err = s.classify(ctx, "connect to clickhouse", err)
		}
	}
	if err != nil {
		return "", s.explain(ctx, err)
	}
	return fmt.Sprintf("ClickHouse %s at %s, user %s, database %s", version, s.server(), user, database), nil
}

// server returns the addresses and the protocol of the DSN.
func (s *Sink) server() string {
	return strings.Join(s.addresses, ", ") + " over " + transport{http: s.http, secure: s.secure}.name()
}

// explain returns the problem and the remedy for an error of the first statement of a
// connection.
func (s *Sink) explain(ctx context.Context, err error) error {
	if hasCode(err, unknownDatabase) {
		return s.databaseMissing()
	}
	err = s.checkTransport(ctx, err)
	if _, ok := errors.AsType[*sink.MisconfiguredError](err); ok {
		return err
	}
	server := "clickhouse at " + s.server()
	problem := func(remedy string) error {
		return &checkup.ProblemError{Problem: fmt.Sprintf("%s: %v", server, causeOf(err)), Remedy: remedy}
	}
	if refused, ok := errors.AsType[*serverError](err); ok {
		switch refused.code {
		case unknownUser, wrongPassword, requiredPassword, authenticationFailed:
			return problem("correct the user and the password in clickhouse.dsn")
		case accessDenied:
			return problem("grant the missing right to the user " + quoteIdentifier(s.user))
		}
		return problem("find the cause in the log of ClickHouse")
	}
	_, foreign := errors.AsType[foreignResponseError](err)
	_, untrusted := errors.AsType[*tls.CertificateVerificationError](err)
	netErr, isNet := errors.AsType[net.Error](err)
	switch {
	case foreign:
		return problem("correct the host and the port in clickhouse.dsn: another program responds there")
	case untrusted:
		return problem("install the certificate of the server's authority on this machine, or use the name in the server's certificate")
	case errors.Is(err, context.DeadlineExceeded), isNet && netErr.Timeout():
		return checkup.NoResponse(server, "the host and the port in clickhouse.dsn")
	case isUnreachable(err):
		return problem("start ClickHouse, or correct the host and the port in clickhouse.dsn")
	}
	return problem("find the cause in the log of ClickHouse")
}

// causeOf returns the error without its class and its operation.
func causeOf(err error) error {
	classified, ok := errors.AsType[*sink.Error](err)
	if !ok {
		return err
	}
	if cause := errors.Unwrap(classified.Err); cause != nil {
		return cause
	}
	return classified.Err
}

// inspectTableSettings checks the settings, and warns if the deduplication window is too
// small for the load.
func (s *Sink) inspectTableSettings(resolving context.Context, definition, placed string, load Load) (string, error) {
	checked, err := s.checkTableSettings(resolving, definition, placed)
	if err != nil {
		return "", err
	}
	texts := make([]string, len(checked))
	for i, setting := range checked {
		texts[i] = setting.name + " = " + setting.value
	}
	i := slices.IndexFunc(checked, func(setting checkedSetting) bool { return setting.name == windowSetting(placed) })
	window, err := strconv.ParseFloat(checked[i].value, 64)
	if blocks := load.blocks(); err == nil && window < blocks {
		return "", checkup.Warn(
			fmt.Sprintf("%s is %s, and relays with relay.flush_timeout = %s and relay.linger = %s can insert %.0f blocks within the deadline of an insert",
				checked[i].name, checked[i].value, load.FlushTimeout, load.Linger, blocks),
			fmt.Sprintf("ALTER TABLE %s%s MODIFY SETTING %s = %.0f", s.table, onCluster(s.cluster), checked[i].name, 2*blocks))
	}
	return strings.Join(texts, ", "), nil
}

// checkInsert inserts no rows. Without a row, ClickHouse checks the right and whether the
// table accepts inserts, and creates no part.
func (s *Sink) checkInsert(ctx context.Context) error {
	settings, err := s.settingsOfInsert(ctx)
	if err != nil {
		return err
	}
	values := make([]string, len(columns))
	for i, c := range columns {
		values[i] = "defaultValueOfTypeName(" + quoteString(c.Type) + ")"
	}
	err = s.conn.Exec(chgo.Context(ctx, chgo.WithSettings(settings)), s.insertStatement()+" SELECT "+strings.Join(values, ", ")+" WHERE 0")
	if err != nil {
		err = s.classify(ctx, "insert no rows", err)
	}
	if hasCode(err, accessDenied) {
		return &checkup.ProblemError{
			Problem: "the clickhouse user may not insert: " + err.Error(),
			Remedy:  fmt.Sprintf("GRANT INSERT ON %s TO %s", s.table, quoteIdentifier(s.user)),
		}
	}
	return err
}
