package outboxtest

import "fmt"

// FullXactID returns a query that computes a full transaction id from its lower bits and
// from own, the id of the current transaction.
func FullXactID(own, lowerBits int64) string {
	return fmt.Sprintf("SELECT %s FROM (VALUES (%d::bigint, %d::bigint)) AS ids (own, inserted_by)", fullXactID, own, lowerBits)
}
