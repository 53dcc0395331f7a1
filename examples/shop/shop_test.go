package shop_test

import (
	"database/sql"
	"os"
	"testing"

	_ "github.com/lib/pq" // the driver

	"github.com/diehard-outbox/diehard/examples/shop"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
)

// begin begins a transaction that is rolled back after the test.
func begin(t *testing.T) *sql.Tx {
	t.Helper()
	if os.Getenv("DATABASE_URL") == "" {
		t.Skip("DATABASE_URL is not set")
	}
	db, err := sql.Open("postgres", os.Getenv("DATABASE_URL"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	tx, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tx.Rollback() })
	return tx
}

func TestAnOrderIsPublished(t *testing.T) {
	tx := begin(t)
	if err := shop.PlaceOrder(t.Context(), tx, 42, 4200); err != nil {
		t.Fatal(err)
	}
	outboxtest.RequirePublished(t.Context(), t, tx, outboxtest.Want{
		EventType:       "order_placed",
		EventContext:    `{"order_id": 42, "cents": 4200}`,
		MetadataVersion: 2,
	})
}

func TestARefusedOrderIsNotPublished(t *testing.T) {
	tx := begin(t)
	if err := shop.PlaceOrder(t.Context(), tx, 42, 0); err == nil {
		t.Fatal("an order without an amount was placed")
	}
	outboxtest.RequireNotPublished(t.Context(), t, tx, outboxtest.Want{EventType: "order_placed"})
}
