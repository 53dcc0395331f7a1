// The program pgxstdlib publishes with database/sql and pgx.
//
// Behind PgBouncer in transaction mode, pgx needs default_query_exec_mode=exec in
// DATABASE_URL. Publish works in every mode.
package main

import (
	"context"
	"database/sql"
	"fmt"
	"os"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// OrderPlaced becomes an event of the type order_placed.
type OrderPlaced struct {
	OrderID int64 `json:"order_id"`
	Cents   int64 `json:"cents"`
}

func main() {
	db, err := sql.Open("pgx", os.Getenv("DATABASE_URL"))
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
func placeOrder(ctx context.Context, db *sql.DB, publisher *outbox.Publisher, order OrderPlaced) error {
	event, err := outbox.NewEvent(order)
	if err != nil {
		return err
	}
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after the commit
	if err := publisher.Publish(ctx, tx, event); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO orders (id, cents) VALUES ($1, $2)", order.OrderID, order.Cents); err != nil {
		return err
	}
	return tx.Commit()
}
