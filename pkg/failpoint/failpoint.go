// Package failpoint names the steps of publishing and delivery at which a test kills or
// suspends a program. Without the build tag failpoints, At does nothing and the compiler
// removes it.
package failpoint

// Point is a step. The program has just completed the named operation, unless the name
// contains "before".
type Point string

// The steps, in the order of an event's life.
const (
	KeyTaken         Point = "key-taken"         // an idempotency key is locked in the caller's transaction
	PublishBefore    Point = "publish-before"    // the event is not written
	PublishInserted  Point = "publish-inserted"  // the event is written, in the caller's transaction
	KeyKept          Point = "key-kept"          // the key and the response are written, in the same transaction
	PublishCommitted Point = "publish-committed" // the caller has not received the result yet

	CutLocked       Point = "cut-locked"
	CutWritten      Point = "cut-written" // a batch is written, in the transaction
	CutBeforeCommit Point = "cut-before-commit"
	CutCommitted    Point = "cut-committed"

	WatermarkBeforeCommit Point = "watermark-before-commit" // the low watermark is lowered
	HistoryBeforeCommit   Point = "history-before-commit"   // all events are unverified
	HistoryCommitted      Point = "history-committed"

	ClaimBefore Point = "claim-before"
	ClaimMarked Point = "claim-marked" // the attempt is counted and committed
	ClaimLeased Point = "claim-leased"

	FlushRead         Point = "flush-read"         // the events are in memory, and the deadline has started
	FlushBegun        Point = "flush-begun"        // the sink has received the statement, but no rows
	FlushAcknowledged Point = "flush-acknowledged" // the sink has acknowledged the insert

	ResolveRead          Point = "resolve-read"   // the keys of the events are read
	ResolveWaited        Point = "resolve-waited" // no earlier insert is in flight
	ResolveChecked       Point = "resolve-checked"
	ReinsertAcknowledged Point = "reinsert-acknowledged" // the sink has acknowledged an insert under the same token
	ReinsertWaited       Point = "reinsert-waited"
	ReinsertChecked      Point = "reinsert-checked"
	SampleEnded          Point = "sample-ended" // the insert of some events of the batch has ended, with or without an error
	SampleWaited         Point = "sample-waited"
	SampleChecked        Point = "sample-checked"

	SettleDeleted          Point = "settle-deleted" // the events are deleted, in the transaction
	SettleBeforeCommit     Point = "settle-before-commit"
	SettleCommitted        Point = "settle-committed"
	RetryBeforeCommit      Point = "retry-before-commit"
	RetryCommitted         Point = "retry-committed"
	RenewTokenBeforeCommit Point = "renew-token-before-commit"
	RenewTokenCommitted    Point = "renew-token-committed"
	ShrinkDeleted          Point = "shrink-deleted" // some of the events have left the batch, in the transaction
	ShrinkBeforeCommit     Point = "shrink-before-commit"
	ShrinkCommitted        Point = "shrink-committed"

	RequeueBeforeCommit Point = "requeue-before-commit" // the dead letters are events again
	RequeueCommitted    Point = "requeue-committed"     // the operator has not received the result yet
)

// All lists every failpoint.
var All = []Point{
	KeyTaken, PublishBefore, PublishInserted, KeyKept, PublishCommitted,
	CutLocked, CutWritten, CutBeforeCommit, CutCommitted,
	WatermarkBeforeCommit, HistoryBeforeCommit, HistoryCommitted,
	ClaimBefore, ClaimMarked, ClaimLeased,
	FlushRead, FlushBegun, FlushAcknowledged,
	ResolveRead, ResolveWaited, ResolveChecked, ReinsertAcknowledged, ReinsertWaited, ReinsertChecked,
	SampleEnded, SampleWaited, SampleChecked,
	SettleDeleted, SettleBeforeCommit, SettleCommitted,
	RetryBeforeCommit, RetryCommitted,
	RenewTokenBeforeCommit, RenewTokenCommitted,
	ShrinkDeleted, ShrinkBeforeCommit, ShrinkCommitted,
	RequeueBeforeCommit, RequeueCommitted,
}
