// Command api serves the HTTP API. It creates each user and the user's event in
// one PostgreSQL transaction.
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
		Short:    "Create users over HTTP and publish an event for each",
		Version:  version,
		AddFlags: config.AddAPIFlags,
		Load:     load,
		Reporting: func(c *config.API) cli.Reporting {
			return cli.Reporting{Environment: c.Environment, Log: c.Log, Sentry: c.Sentry}
		},
		Commands: []cli.Command[*config.API]{
			{Name: "serve", Short: "Serve the API until stopped by a signal", Run: serve},
			{Name: "migrate", Short: "Migrate the PostgreSQL schema", Run: migrate, Printed: printed},
		},
	}.Main())
}

func load(o config.LoadOptions) (*config.API, []string, error) {
	c, unknown, err := config.LoadAPI(o)
	return &c, unknown, err
}
