package outboxtest_test

import (
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
)

func TestOutboxtest(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "outboxtest")
}

var suite = testengines.Start(testengines.Options{Postgres: true})
