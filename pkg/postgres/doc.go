// Package postgres is what Diehard asks of PostgreSQL beyond its SQL: opening a
// pool that notices a dead server, transactions, migrations, classes of
// errors, and listening for notifications.
package postgres
