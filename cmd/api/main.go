// Command api serves the HTTP API. The change of a user and its event commit in one
// PostgreSQL transaction.
package main

import (
	"os"

	"github.com/diehard-outbox/diehard/cmd/internal/cli"
	"github.com/diehard-outbox/diehard/pkg/config"
)

var version = "dev" // set by the linker

func main() {
	os.Exit(cli.Program[*config.API]{
		Name:     "api",
		Short:    "Serve users and events over HTTP, and publish an event for each change",
		Version:  version,
		AddFlags: config.AddAPIFlags,
		Load:     load,
		Reporting: func(c *config.API) cli.Reporting {
			return cli.Reporting{Environment: c.Environment, Log: c.Log, Sentry: c.Sentry}
		},
		Commands: []cli.Command[*config.API]{
			{Name: "serve", Short: "Serve the API until stopped by a signal", Run: serve},
			{Name: "migrate", Short: "Migrate the PostgreSQL schema", Run: migrate, Printed: printed},
			cli.Health(func(c *config.API) string { return c.Admin.Addr }),
		},
	}.Main())
}

func load(o config.LoadOptions) (*config.API, []string, error) {
	c, unknown, err := config.LoadAPI(o)
	return &c, unknown, err
}
