// Package outbox publishes events in the caller's own PostgreSQL transaction.
//
// # The problem
//
// A service changes its database and then sends a message to another system: an order was
// placed, or a user was created. The service cannot write to both systems at once. A
// crash between the two writes loses the message, or leaves a message about a change that
// was rolled back. Changing the order of the writes does not help.
//
// # The outbox
//
// The service writes the event into a table, in the same transaction as the change.
// PostgreSQL commits both or neither. A separate process, Diehard's relay, reads the
// table, delivers the events to ClickHouse and deletes them.
//
//	publisher := outbox.NewPublisher(outbox.PublisherOptions{Environment: "Production"})
//
//	tx, err := db.BeginTx(ctx, nil)
//	…
//	defer tx.Rollback()
//	_, err = tx.ExecContext(ctx, "INSERT INTO orders …")
//	…
//	event, err := outbox.NewEvent(OrderPlaced{OrderID: 42}) // its type is order_placed
//	…
//	err = publisher.Publish(ctx, tx, event)
//	…
//	return tx.Commit()
//
// Publish accepts *sql.Tx, and types that embed *sql.Tx: *sqlx.Tx, bun.Tx.Tx, GORM's
// connection pool inside a transaction. [Pgx] adapts a pgx.Tx. [ExecFunc] adapts any
// other function that executes a statement in a transaction. The package imports no
// driver. The folder examples of the repository has a program for each of these types.
//
// `relay migrate` creates the table. `relay migrate --print` prints the SQL that creates
// it.
//
// # Guarantees
//
//   - If the transaction commits, the event is delivered exactly once, as seen in
//     ClickHouse. If the transaction does not commit, no event is delivered.
//   - Publishing requires only PostgreSQL. ClickHouse may be slow or down.
//   - The payload's JSON is delivered byte for byte.
//
// # No guarantees
//
//   - Order. Events of one transaction may arrive in different inserts, and a later
//     event may arrive first. Sort by EventDateTime.
//   - Deduplication of events that the caller publishes twice. Two events with the same
//     EventID are two rows.
//   - Latency. Without a fault, an event arrives well within a second: see [Notifier].
package outbox
