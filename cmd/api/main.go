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
			{Name: "migrate", Short: "Bring PostgreSQL's schema up to date", Run: migrate},
		},
	}.Main())
}

// keysVariable is the one by which an operator expects the API to ask for keys.
const keysVariable = "DIEHARD_API_KEYS"

func load(o config.LoadOptions) (*config.API, []string, error) {
	// Not a warning: this version would serve everybody.
	if os.Getenv(keysVariable) != "" {
		return nil, nil, &config.Error{Problem: keysVariable + " is set, and this version knows no keys: " +
			"unset it, and keep the API where only those reach it who may"}
	}
	c, unknown, err := config.LoadAPI(o)
	return &c, unknown, err
}
