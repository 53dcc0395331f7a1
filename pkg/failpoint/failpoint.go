// Package failpoint names the steps of delivery at which a test kills or suspends a
// program. Without the build tag failpoints, At does nothing, and the compiler removes it.
package failpoint

// Point is a step: the program has just done what the name says, unless the name says
// before.
type Point string

// The steps, in the order of an event's life.
const (
	KeyTaken         Point = "key-taken"         // an idempotency key, in the caller's transaction
	PublishBefore    Point = "publish-before"    // nothing of the event is written
	PublishInserted  Point = "publish-inserted"  // in the caller's transaction
	KeyKept          Point = "key-kept"          // with the answer, in the same
	PublishCommitted Point = "publish-committed" // and the caller does not know it yet

	CutLocked       Point = "cut-locked"
	CutWritten      Point = "cut-written" // a batch, in the transaction
	CutBeforeCommit Point = "cut-before-commit"
	CutCommitted    Point = "cut-committed"

	WatermarkBeforeCommit Point = "watermark-before-commit" // the low watermark is lowered
	HistoryBeforeCommit   Point = "history-before-commit"   // all events are unverified
	HistoryCommitted      Point = "history-committed"

	ClaimBefore Point = "claim-before"
	ClaimMarked Point = "claim-marked" // committed: the attempt is counted
	ClaimLeased Point = "claim-leased"

	FlushRead         Point = "flush-read"         // the events, into memory. The deadline runs
	FlushBegun        Point = "flush-begun"        // the sink knows the statement, and no rows
	FlushAcknowledged Point = "flush-acknowledged" // and acknowledged

	ResolveRead          Point = "resolve-read"   // the events' keys
	ResolveWaited        Point = "resolve-waited" // no earlier insert is in flight
	ResolveChecked       Point = "resolve-checked"
	ReinsertAcknowledged Point = "reinsert-acknowledged" // under the same token, and acknowledged
	ReinsertWaited       Point = "reinsert-waited"
	ReinsertChecked      Point = "reinsert-checked"

	SettleDeleted          Point = "settle-deleted" // the events, in the transaction
	SettleBeforeCommit     Point = "settle-before-commit"
	SettleCommitted        Point = "settle-committed"
	RetryBeforeCommit      Point = "retry-before-commit"
	RetryCommitted         Point = "retry-committed"
	RenewTokenBeforeCommit Point = "renew-token-before-commit"
	RenewTokenCommitted    Point = "renew-token-committed"
	ShrinkDeleted          Point = "shrink-deleted" // some of the events, in the transaction
	ShrinkBeforeCommit     Point = "shrink-before-commit"
	ShrinkCommitted        Point = "shrink-committed"
	SplitDeleted           Point = "split-deleted" // the batch, in the transaction
	SplitBeforeCommit      Point = "split-before-commit"
	SplitCommitted         Point = "split-committed"

	RequeueBeforeCommit Point = "requeue-before-commit" // dead letters are events again
	RequeueCommitted    Point = "requeue-committed"     // and the operator does not know it yet
)

// All lists every failpoint.
var All = []Point{
	KeyTaken, PublishBefore, PublishInserted, KeyKept, PublishCommitted,
	CutLocked, CutWritten, CutBeforeCommit, CutCommitted,
	WatermarkBeforeCommit, HistoryBeforeCommit, HistoryCommitted,
	ClaimBefore, ClaimMarked, ClaimLeased,
	FlushRead, FlushBegun, FlushAcknowledged,
	ResolveRead, ResolveWaited, ResolveChecked, ReinsertAcknowledged, ReinsertWaited, ReinsertChecked,
	SettleDeleted, SettleBeforeCommit, SettleCommitted,
	RetryBeforeCommit, RetryCommitted,
	RenewTokenBeforeCommit, RenewTokenCommitted,
	ShrinkDeleted, ShrinkBeforeCommit, ShrinkCommitted,
	SplitDeleted, SplitBeforeCommit, SplitCommitted,
	RequeueBeforeCommit, RequeueCommitted,
}
