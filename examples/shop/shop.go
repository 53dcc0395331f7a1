// Package shop is an application. Its test checks the events that it publishes.
package shop

import (
	"context"
	"database/sql"
	"errors"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

var publisher = outbox.NewPublisher(outbox.PublisherOptions{Environment: "Production"})

// OrderPlaced is the payload of an event.
type OrderPlaced struct {
	OrderID int64 `json:"order_id"`
	Cents   int64 `json:"cents"`
}

// EventType returns the event's type. Without this method the event's type would come
// from the name of the Go type, and would change if somebody renamed the Go type.
func (OrderPlaced) EventType() string { return "order_placed" }

// EventVersion is the version of the payload's schema.
func (OrderPlaced) EventVersion() int64 { return 2 }

var errAmount = errors.New("an order must have an amount")

// PlaceOrder inserts an order and publishes it, in the caller's transaction.
func PlaceOrder(ctx context.Context, tx *sql.Tx, id, cents int64) error {
	if cents <= 0 {
		return errAmount
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO orders (id, cents) VALUES ($1, $2)", id, cents); err != nil {
		return err
	}
	event, err := outbox.NewEvent(OrderPlaced{OrderID: id, Cents: cents})
	if err != nil {
		return err
	}
	return publisher.Publish(ctx, tx, event)
}
