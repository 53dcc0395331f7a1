// Package postgres provides connection pools that detect dead servers, transactions,
// migrations, error classes and notifications.
package postgres
