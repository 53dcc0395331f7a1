// The program pgx publishes with pgx's own interface.
//
// Behind PgBouncer in transaction mode, pgx needs default_query_exec_mode=exec in
// DATABASE_URL. Publish works in every mode.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// OrderPlaced becomes an event of the type order_placed.
type OrderPlaced struct {
	OrderID int64 `json:"order_id"`
	Cents   int64 `json:"cents"`
}

func main() {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		panic(err)
	}
	defer pool.Close()

	publisher := outbox.NewPublisher(outbox.PublisherOptions{Environment: "Production"})
	// The table accepts the first order and refuses the second.
	for _, order := range []OrderPlaced{{OrderID: 1, Cents: 4200}, {OrderID: 2, Cents: -1}} {
		if err := placeOrder(ctx, pool, publisher, order); err != nil {
			fmt.Println("order", order.OrderID, "was refused:", err)
		}
	}
}

// placeOrder inserts the order and publishes it in one transaction. If the order is
// refused, its event is rolled back.
func placeOrder(ctx context.Context, pool *pgxpool.Pool, publisher *outbox.Publisher, order OrderPlaced) error {
	event, err := outbox.NewEvent(order)
	if err != nil {
		return err
	}
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if err := publisher.Publish(ctx, outbox.Pgx(tx), event); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "INSERT INTO orders (id, cents) VALUES ($1, $2)", order.OrderID, order.Cents)
		return err
	})
}
