// Command api creates users over HTTP, each with its event in the outbox, in
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
		Short:    "Create users over HTTP, each with its event in the outbox",
		Version:  version,
		AddFlags: config.AddAPIFlags,
		Load:     load,
		Reporting: func(c *config.API) cli.Reporting {
			return cli.Reporting{Environment: c.Environment, Log: c.Log, Sentry: c.Sentry}
		},
		Commands: []cli.Command[*config.API]{
			{Name: "serve", Short: "Serve the API until told to stop", Run: serve},
			{Name: "migrate", Short: "Bring PostgreSQL's schema up to date", Run: migrate, Printed: printed},
		},
	}.Main())
}

func load(o config.LoadOptions) (*config.API, []string, error) {
	c, unknown, err := config.LoadAPI(o)
	return &c, unknown, err
}
