package outboxtest

import "fmt"

// FullXactID is a query of the id that belongs to the lower bits of an id, beside the
// transaction's own.
func FullXactID(own, lowerBits int64) string {
	return fmt.Sprintf("SELECT %s FROM (VALUES (%d::bigint, %d::bigint)) AS ids (own, inserted_by)", fullXactID, own, lowerBits)
}
