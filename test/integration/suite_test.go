// Package integration_test drives the built programs against real engines: a
// request creates a user and its event, relays carry the event to ClickHouse.
package integration_test

import (
	"context"
	"testing"

	"github.com/diehard-outbox/diehard/internal/testengines"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

func TestIntegration(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "integration")
}

var suite = testengines.Start(testengines.Options{Postgres: true, ClickHouse: true, Prepare: programs.Build(programs.Race())})

// patience is how long a spec waits for what must happen.
const patience = system.Patience

// protocols are what ClickHouse is spoken to in.
var protocols = []TableEntry{Entry("over the native protocol", "native"), Entry("over HTTP", "http")}

func newSystem(ctx context.Context) *system.System {
	GinkgoHelper()
	return system.New(suite.Prepared(), suite.PostgresDSN(ctx), suite.ClickHouseDSNs(ctx))
}
