// Package integration_test runs the built programs with real engines. A request creates
// a user and its event, and relays deliver the event to ClickHouse.
package integration_test

import (
	"context"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

func TestIntegration(t *testing.T) {
	RegisterFailHandler(Fail)
	SetDefaultEventuallyPollingInterval(system.Polling)
	RunSpecs(t, "integration")
}

var suite = testengines.Start(testengines.Options{Postgres: true, ClickHouse: true, Prepare: programs.Build(programs.Race())})

// patience limits the wait for an expected effect.
const patience = system.Patience

// protocols lists the protocols to ClickHouse.
var protocols = []TableEntry{Entry("over the native protocol", "native"), Entry("over HTTP", "http")}

func newSystem(ctx context.Context) *system.System {
	GinkgoHelper()
	return system.New(suite.Prepared(), suite.PostgresDSN(ctx), suite.ClickHouseDSNs(ctx))
}
