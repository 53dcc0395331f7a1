// The program gorm publishes with GORM.
package main

import (
	"context"
	"fmt"
	"os"

	"gorm.io/driver/postgres"
	"gorm.io/gorm"

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
	db, err := gorm.Open(postgres.Open(os.Getenv("DATABASE_URL")), &gorm.Config{})
	if err != nil {
		panic(err)
	}
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
func placeOrder(ctx context.Context, db *gorm.DB, publisher *outbox.Publisher, order Order) error {
	event, err := outbox.NewEvent(OrderPlaced{OrderID: order.ID, Cents: order.Cents})
	if err != nil {
		return err
	}
	return db.WithContext(ctx).Transaction(func(tx *gorm.DB) error {
		// Inside of a transaction, GORM's pool is a *sql.Tx or wraps a *sql.Tx.
		sqlTx, ok := tx.Statement.ConnPool.(outbox.Tx)
		if !ok {
			return gorm.ErrInvalidTransaction
		}
		if err := publisher.Publish(ctx, sqlTx, event); err != nil {
			return err
		}
		return tx.Create(&order).Error
	})
}
