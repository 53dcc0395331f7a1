// Package outbox publishes events in the caller's own PostgreSQL transaction.
//
// # The problem
//
// A service changes its database and then tells another system: that an order was
// placed, that a user was created. If it writes to both systems one after the
// other, a crash in between loses the message, or sends a message about something
// that was rolled back. No order of the two writes avoids that.
//
// # The outbox
//
// The event is written into a table in the same transaction as the change. The two
// commit together, or neither does. A separate process, Diehard's relay, reads the
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
// Publish accepts *sql.Tx, and types that embed it: *sqlx.Tx, bun.Tx.Tx, GORM's
// connection pool inside of a transaction. [Pgx] adapts a pgx.Tx, and [ExecFunc]
// anything else that can execute a statement. The package imports no driver. The
// folder examples of the repository has a program for each.
//
// The table is created by `relay migrate`, or by the SQL that `relay migrate
// --print` shows.
//
// # What is promised
//
//   - If the transaction commits, the event is delivered exactly once, as seen in
//     ClickHouse. If it does not commit, the event never existed.
//   - Publishing needs PostgreSQL only. ClickHouse may be slow or down.
//   - The payload's JSON is delivered byte for byte.
//
// # What is not promised
//
//   - Order. Events of one transaction may arrive in different inserts, and a later
//     event may arrive first. Sort by EventDateTime.
//   - Deduplication of what the caller publishes twice. Two events with one EventID
//     are two rows.
//   - A time of arrival. Without a fault it is well below a second: see [Notifier].
package outbox
