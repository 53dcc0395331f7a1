package clickhouse_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	chgo "github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"github.com/google/uuid"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/clickhouse"
	"github.com/diehard-outbox/diehard/pkg/sink/conformance"
	"github.com/diehard-outbox/diehard/pkg/sink/sinktest"
)

func TestClickHouse(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "sink/clickhouse")
}

var suite = testengines.Start(testengines.Options{ClickHouse: true})

// servers returns the DSN of the server's default database for the protocol.
func servers(protocol string) string {
	native, http := suite.ServerClickHouseDSNs()
	compress := func(dsn string) string { return with(dsn, parameter("compress", "lz4")) }
	return map[string]string{
		"native": compress(native), "http": compress(http), "native, uncompressed": native, "http, uncompressed": http,
	}[protocol]
}

var protocols = []string{"native", "http", "native, uncompressed", "http, uncompressed"}

var databases atomic.Int32

// database is the database of one spec, used over one protocol.
type database struct {
	name, dsn string
	conn      driver.Conn
}

func newDatabase(ctx context.Context, protocol string) *database {
	GinkgoHelper()
	db := &database{name: fmt.Sprintf("spec_%d_%d", GinkgoParallelProcess(), databases.Add(1))}
	db.dsn = with(servers(protocol), func(u *url.URL) { u.Path = "/" + db.name })

	options, err := chgo.ParseDSN(servers("native"))
	Expect(err).NotTo(HaveOccurred())
	server, err := chgo.Open(options)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(server.Close)
	Expect(server.Exec(ctx, "CREATE DATABASE "+db.name)).To(Succeed())
	DeferCleanup(func(ctx SpecContext) { Expect(server.Exec(ctx, "DROP DATABASE "+db.name)).To(Succeed()) })

	options.Auth.Database = db.name
	db.conn, err = chgo.Open(options)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(db.conn.Close)
	return db
}

// newTable returns a new database with the table, and stops the table's merges.
func newTable(ctx context.Context, protocol string) *database {
	GinkgoHelper()
	db := newDatabase(ctx, protocol)
	Expect(clickhouse.Migrate(ctx, clickhouse.Options{DSN: db.dsn}, slog.New(slog.DiscardHandler))).To(Succeed())
	db.exec(ctx, "SYSTEM STOP MERGES event_log")
	return db
}

func (db *database) exec(ctx context.Context, statement string) {
	GinkgoHelper()
	Expect(db.conn.Exec(ctx, statement)).To(Succeed(), statement)
}

func with(dsn string, changes ...func(*url.URL)) string {
	GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	for _, change := range changes {
		change(u)
	}
	return u.String()
}

func parameter(name, value string) func(*url.URL) {
	return func(u *url.URL) {
		q := u.Query()
		q.Set(name, value)
		u.RawQuery = q.Encode()
	}
}

var _ = func() bool {
	for _, protocol := range protocols {
		window := 20
		if protocol == "native" { // the protocol does not matter, and a thousand parts take seconds
			window = clickhouse.LeastWindow
		}
		sinktest.Describe("ClickHouse over "+protocol, func(ctx context.Context) sinktest.Destination {
			db := newTable(ctx, protocol)
			return sinktest.Destination{
				Addr: mustParse(db.dsn).Host,
				Open: func(addr string) (sink.Sink, error) {
					return clickhouse.Open(clickhouse.Options{DSN: with(db.dsn, func(u *url.URL) { u.Host = addr })})
				},
				Stored: db.stored,
				Slow: func(ctx context.Context, d time.Duration) (conformance.Restore, error) {
					if err := db.conn.Exec(ctx, "CREATE TABLE slow (n UInt8) ENGINE = Null"); err != nil {
						return nil, err
					}
					return db.undoing("DROP TABLE slowly, slow"), db.conn.Exec(ctx, fmt.Sprintf(
						"CREATE MATERIALIZED VIEW slowly TO slow AS SELECT sleep(%f) AS n FROM event_log", d.Seconds()))
				},
				Refuse: func(ctx context.Context, eventType string) (conformance.Restore, error) {
					return db.undoing("ALTER TABLE event_log DROP CONSTRAINT refused"),
						db.conn.Exec(ctx, "ALTER TABLE event_log ADD CONSTRAINT refused CHECK event_type != '"+eventType+"'")
				},
				Window: window,
				Hide: func(eventType string) (sink.Sink, error) {
					_, dsn := db.hide("event_type != '" + eventType + "'")
					return clickhouse.Open(clickhouse.Options{DSN: dsn})
				},
				Spoil: func(ctx context.Context) error {
					return db.conn.Exec(ctx, "ALTER TABLE event_log MODIFY SETTING non_replicated_deduplication_window = 0")
				},
			}
		})
	}
	return true
}()

// undoing returns a function that executes the statement.
func (db *database) undoing(statement string) conformance.Restore {
	return func(ctx context.Context) error { return db.conn.Exec(ctx, statement) }
}

// hide starts a gateway that hides the rows for which the condition is false. It returns
// the DSN of the gateway. The engine of the tests has no row policies. A filter that the
// gateway adds to each statement has the same effect, and the sink cannot remove it.
func (db *database) hide(visible string) (g *faults.Gateway, dsn string) {
	GinkgoHelper()
	g, dsn = faults.StartGatewayTo(with(servers("http, uncompressed"), func(u *url.URL) { u.Path = "/" + db.name }))
	g.Impose("additional_table_filters=" + url.QueryEscape("{'event_log': '"+strings.ReplaceAll(visible, "'", `\'`)+"'}"))
	return g, dsn
}

func mustParse(dsn string) *url.URL {
	GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	return u
}

// stored reads the table. It reads times as numbers, because the driver supports times
// only up to 2262.
func (db *database) stored(ctx context.Context) (*sink.Events, error) {
	rows, err := db.conn.Query(ctx, "SELECT event_id, event_type, toUnixTimestamp64Micro(event_date_time), environment,"+
		" event_context, metadata_version FROM event_log")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	e := &sink.Events{}
	for rows.Next() {
		var (
			id                                   uuid.UUID
			eventType, environment, eventContext string
			at                                   int64
			version                              uint64
		)
		if err := rows.Scan(&id, &eventType, &at, &environment, &eventContext, &version); err != nil {
			return nil, err
		}
		e.EventID = append(e.EventID, id)
		e.EventType.Append([]byte(eventType))
		e.EventDateTime = append(e.EventDateTime, at)
		e.Environment.Append([]byte(environment))
		e.EventContext.Append([]byte(eventContext))
		e.MetadataVersion = append(e.MetadataVersion, version)
	}
	return e, rows.Err()
}
