package store

import (
	"context"
	"encoding/json"
	"fmt"
	"time"
)

// auditSQL writes an action into the audit table. A statement adds the rows of the action,
// so that an action without effect leaves no audit row.
const auditSQL = `INSERT INTO {schema}outbox_audit (actor, action, details) SELECT $1, $2, $3::jsonb`

// The actions of the audit table.
const (
	ActionPause              = "pause"
	ActionResume             = "resume"
	ActionRetryBatch         = "batch_retry"
	ActionSplitBatch         = "batch_split"
	ActionMendFuse           = "fuse_mend"
	ActionRequeueDeadLetters = "dead_letters_retry"
	ActionDiscardDeadLetters = "dead_letters_discard"
)

// act executes an action with its audit row. It returns whether the action has changed a
// row. The first three parameters of the statement are those of auditSQL.
func (s *Store) act(ctx context.Context, operation, statement, actor, action string, details any, more ...any) (bool, error) {
	encoded, err := json.Marshal(details)
	if err != nil {
		return false, fmt.Errorf("%s: %w", operation, err)
	}
	result, err := s.exec(ctx, statement, append([]any{actor, action, string(encoded)}, more...)...)
	if err != nil {
		return false, fmt.Errorf("%s: %w", operation, err)
	}
	audited, err := result.RowsAffected()
	if err != nil {
		return false, fmt.Errorf("%s: %w", operation, err)
	}
	return audited > 0, nil
}

// AuditDeadLetters writes an action on dead letters into the audit table, before the
// action. ids are the ids of the dead letters, and must not be empty.
func (s *Store) AuditDeadLetters(ctx context.Context, actor, action string, ids []int64) error {
	details := map[string]any{"dead_letters": len(ids), "first_id": ids[0], "last_id": ids[len(ids)-1]}
	_, err := s.act(ctx, "write the audit table", auditSQL, actor, action, details)
	return err
}

// AuditRecord is an action of an operator.
type AuditRecord struct {
	At      time.Time       `db:"at"      json:"at"`
	Actor   string          `db:"actor"   json:"actor"`
	Action  string          `db:"action"  json:"action"`
	Details json.RawMessage `db:"details" json:"details"`
}

const auditLogSQL = `SELECT at, actor, action, details FROM {schema}outbox_audit ORDER BY id DESC LIMIT $1`

// AuditLog returns the last actions of operators, the newest first.
func (s *Store) AuditLog(ctx context.Context, limit int) ([]AuditRecord, error) {
	var records []AuditRecord
	if err := s.selectAll(ctx, &records, auditLogSQL, limit); err != nil {
		return nil, fmt.Errorf("read the audit table: %w", err)
	}
	for i := range records {
		records[i].At = records[i].At.UTC()
	}
	return records, nil
}
