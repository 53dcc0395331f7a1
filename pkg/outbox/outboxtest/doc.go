// Package outboxtest helps an application to test what it publishes.
//
// A test begins a transaction, calls the application's own code, requires the events
// that the transaction has published, and rolls back:
//
//	tx, err := db.BeginTx(ctx, nil)
//	…
//	defer tx.Rollback()
//	err = shop.PlaceOrder(ctx, tx, 42)
//	…
//	outboxtest.RequirePublished(ctx, t, tx, outboxtest.Want{
//		EventType:    "order_placed",
//		EventContext: `{"order_id": 42}`,
//	})
//
// Only the events of this transaction count. Events that others have committed do not
// disturb the test, so that tests may share a database and run in parallel. Events
// from within a savepoint count, unless the savepoint was rolled back.
//
// The functions accept *sql.Tx, and types that embed it, such as *sqlx.Tx. [Pgx]
// adapts a pgx.Tx. [InSchema] names the schema of the outbox. The test needs the right
// to SELECT from outbox_events, which the application itself can do without.
package outboxtest
