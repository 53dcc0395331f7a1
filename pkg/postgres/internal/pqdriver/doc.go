// Package pqdriver makes a driver for PostgreSQL of lib/pq. It holds what pkg/postgres
// needs only because of how lib/pq works.
package pqdriver
