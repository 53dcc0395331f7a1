// Package postgres provides connection pools, transactions, migrations, error classes
// and notifications. Its pools detect dead servers.
package postgres
