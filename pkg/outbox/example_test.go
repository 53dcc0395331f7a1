package outbox_test

import (
	"context"
	"database/sql"
	"fmt"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// OrderPlaced becomes an event of the type order_placed.
type OrderPlaced struct {
	OrderID int64 `json:"order_id"`
	Cents   int64 `json:"cents"`
}

// placeOrder writes an order and its event in one transaction. PostgreSQL commits both or
// neither.
func placeOrder(ctx context.Context, db *sql.DB, publisher *outbox.Publisher, orderID, cents int64) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after the commit

	event, err := outbox.NewEvent(OrderPlaced{OrderID: orderID, Cents: cents})
	if err != nil {
		return err
	}
	if err := publisher.Publish(ctx, tx, event); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO orders (id, cents) VALUES ($1, $2)", orderID, cents); err != nil {
		return err
	}
	return tx.Commit()
}

// A service publishes an event in the transaction in which it changes its own table.
func Example() {
	ctx := context.Background()
	db, stop := exampleDatabase(ctx) // a PostgreSQL server that `api migrate` has migrated
	defer stop()
	if _, err := db.ExecContext(ctx, "CREATE TABLE orders (id bigint PRIMARY KEY, cents bigint CHECK (cents > 0))"); err != nil {
		panic(err)
	}

	publisher := outbox.NewPublisher(outbox.PublisherOptions{Environment: "Production"})
	if err := placeOrder(ctx, db, publisher, 1, 4200); err != nil {
		panic(err)
	}
	// The table refuses the second order: its event is rolled back with it.
	if err := placeOrder(ctx, db, publisher, 2, -1); err != nil {
		fmt.Println(err)
	}

	var events int
	var eventType, environment, eventContext string
	if err := db.QueryRowContext(ctx, `SELECT count(*), min(event_type), min(environment), min(event_context::text) FROM outbox_events`).
		Scan(&events, &eventType, &environment, &eventContext); err != nil {
		panic(err)
	}
	fmt.Println(events, eventType, environment, eventContext)

	// Output:
	// pq: new row for relation "orders" violates check constraint "orders_cents_check" (23514)
	// 1 order_placed Production {"order_id":1,"cents":4200}
}
