package outbox_test

import (
	"context"
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/engines"
)

func TestOutbox(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "outbox")
}

var suite = engines.Start(engines.Options{})

func newDatabase(ctx context.Context) *sqlx.DB {
	GinkgoHelper()
	return engines.OpenPostgres(suite.PostgresDSN(ctx), outbox.Session(30*time.Second))
}
