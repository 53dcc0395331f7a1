package store_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

func TestStore(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "store")
}

var suite = testengines.Start(testengines.Options{Postgres: true})

var quiet = slog.New(slog.DiscardHandler)

func newDatabase(ctx context.Context) *sqlx.DB {
	GinkgoHelper()
	return testengines.OpenStore(suite.PostgresDSN(ctx), store.Session(30*time.Second))
}
