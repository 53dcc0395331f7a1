// Command relay delivers events from the outbox in PostgreSQL to ClickHouse. Any number
// of relays can run at the same time.
package main

import (
	"os"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/config"
)

var version = "dev" // set by the linker

func main() {
	os.Exit(cli.Program[*config.Relay]{
		Name:     "relay",
		Short:    "Deliver events from the outbox in PostgreSQL to ClickHouse",
		Version:  version,
		AddFlags: config.AddRelayFlags,
		Load:     load,
		Reporting: func(c *config.Relay) cli.Reporting {
			return cli.Reporting{Environment: c.Environment, Log: c.Log, Sentry: c.Sentry}
		},
		Commands: []cli.Command[*config.Relay]{
			{Name: "run", Short: "Deliver events until stopped by a signal", Run: run},
			{Name: "migrate", Short: "Migrate the schemas of PostgreSQL and ClickHouse", Run: migrate, Printed: printed},
			cli.Health(func(c *config.Relay) string { return c.Admin.Addr }),
			status(),
			pause(),
			resume(),
			batches(),
			check(),
			deadLetters(),
		},
	}.Main())
}

func load(o config.LoadOptions) (*config.Relay, []string, error) {
	c, unknown, err := config.LoadRelay(o)
	if err != nil {
		return nil, nil, err
	}
	if o.Offline {
		return &c, unknown, nil
	}
	// Only the sink can validate its DSN.
	if err := sinkOptions(&c).Check(); err != nil {
		return nil, nil, &config.Error{Key: "clickhouse.dsn", Problem: "is invalid: " + err.Error()}
	}
	return &c, unknown, nil
}
