// Package outboxtest helps an application to test the events that it publishes.
//
// A test begins a transaction, calls the application's own code, checks the published
// events of the transaction, and rolls back:
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
// Only the events of this transaction count. Tests can share a database and run in
// parallel, because they ignore the events of other transactions. Events that were
// published within a savepoint count, unless the savepoint was rolled back.
//
// The functions accept *sql.Tx, and types that embed *sql.Tx, such as *sqlx.Tx. [Pgx]
// adapts a pgx.Tx. [InSchema] names the schema of the outbox. The test needs the SELECT
// privilege on outbox_events. The application itself does not need this privilege.
package outboxtest
