// The program sqlx publishes with sqlx.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/jmoiron/sqlx"
	_ "github.com/lib/pq" // the driver

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// OrderPlaced becomes an event of the type order_placed.
type OrderPlaced struct {
	OrderID int64 `db:"id"    json:"order_id"`
	Cents   int64 `db:"cents" json:"cents"`
}

func main() {
	db, err := sqlx.Open("postgres", os.Getenv("DATABASE_URL"))
	if err != nil {
		panic(err)
	}
	defer db.Close()

	publisher := outbox.NewPublisher(outbox.PublisherOptions{Environment: "Production"})
	// The table accepts the first order and refuses the second.
	for _, order := range []OrderPlaced{{OrderID: 1, Cents: 4200}, {OrderID: 2, Cents: -1}} {
		if err := placeOrder(context.Background(), db, publisher, order); err != nil {
			fmt.Println("order", order.OrderID, "was refused:", err)
		}
	}
}

// placeOrder inserts the order and publishes it in one transaction. If the order is
// refused, its event is rolled back.
func placeOrder(ctx context.Context, db *sqlx.DB, publisher *outbox.Publisher, order OrderPlaced) error {
	event, err := outbox.NewEvent(order)
	if err != nil {
		return err
	}
	tx, err := db.BeginTxx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after the commit
	if err := publisher.Publish(ctx, tx, event); err != nil {
		return err
	}
	if _, err := tx.NamedExecContext(ctx, "INSERT INTO orders (id, cents) VALUES (:id, :cents)", order); err != nil {
		return err
	}
	return tx.Commit()
}
