// The program bun publishes with Bun and its driver.
package main

import (
	"context"
	"database/sql"
	"fmt"
	"os"

	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/pgdialect"
	"github.com/uptrace/bun/driver/pgdriver"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// Order is a row of the table orders.
type Order struct {
	ID    int64
	Cents int64
}

// OrderPlaced becomes an event of the type order_placed.
type OrderPlaced struct {
	OrderID int64 `json:"order_id"`
	Cents   int64 `json:"cents"`
}

func main() {
	connector := pgdriver.NewConnector(pgdriver.WithDSN(os.Getenv("DATABASE_URL")))
	db := bun.NewDB(sql.OpenDB(connector), pgdialect.New())
	defer db.Close()

	publisher := outbox.NewPublisher(outbox.PublisherOptions{Environment: "Production"})
	// The table accepts the first order and refuses the second.
	for _, order := range []Order{{ID: 1, Cents: 4200}, {ID: 2, Cents: -1}} {
		if err := placeOrder(context.Background(), db, publisher, order); err != nil {
			fmt.Println("order", order.ID, "was refused:", err)
		}
	}
}

// placeOrder inserts the order and publishes it in one transaction. If the order is
// refused, its event is rolled back.
func placeOrder(ctx context.Context, db *bun.DB, publisher *outbox.Publisher, order Order) error {
	event, err := outbox.NewEvent(OrderPlaced{OrderID: order.ID, Cents: order.Cents})
	if err != nil {
		return err
	}
	return db.RunInTx(ctx, nil, func(ctx context.Context, tx bun.Tx) error {
		// A bun.Tx replaces question marks in the statement. The sql.Tx in it does not.
		if err := publisher.Publish(ctx, tx.Tx, event); err != nil {
			return err
		}
		_, err := tx.NewInsert().Model(&order).Exec(ctx)
		return err
	})
}
