package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// State is what a running stack leaves in its folder for others to find it.
type State struct {
	PID               int    `json:"pid"` // of the program that holds it together
	APIURL            string `json:"api_url"`
	APIAdminURL       string `json:"api_admin_url"`
	RelayAdminURL     string `json:"relay_admin_url"`
	PostgresDSN       string `json:"postgres_dsn"`
	ClickHouseDSN     string `json:"clickhouse_dsn"` // over the native protocol
	ClickHouseHTTPDSN string `json:"clickhouse_http_dsn"`
	EventTable        string `json:"event_table"` // in ClickHouse
	APIPID            int    `json:"api_pid"`
	RelayPID          int    `json:"relay_pid"`
	PostgresPID       int    `json:"postgres_pid"`
	ClickHousePID     int    `json:"clickhouse_pid"`
}

func statePath(dir string) string { return filepath.Join(dir, "state.json") }

// ReadState reads the state of the stack in a folder. The error is
// os.ErrNotExist if there is none that is ready.
func ReadState(dir string) (State, error) {
	content, err := os.ReadFile(statePath(dir))
	if err != nil {
		return State{}, fmt.Errorf("read the stack's state: %w", err)
	}
	var state State
	if err := json.Unmarshal(content, &state); err != nil {
		return State{}, fmt.Errorf("read the stack's state: %w", err)
	}
	return state, nil
}

// writeState writes in one step: who reads finds all or nothing. It holds
// passwords.
func (s *Stack) writeState() error {
	content, err := json.MarshalIndent(s.state, "", "  ")
	if err != nil {
		return fmt.Errorf("write the stack's state: %w", err)
	}
	path := statePath(s.options.Dir)
	if err := os.WriteFile(path+".new", append(content, '\n'), 0o600); err != nil {
		return fmt.Errorf("write the stack's state: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write the stack's state: %w", err)
	}
	return nil
}

func removeState(dir string) error {
	if err := os.Remove(statePath(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err //nolint:wrapcheck // names the file already
	}
	return nil
}

// Answers says whether the stack is there and ready.
func (s State) Answers(ctx context.Context) bool {
	return isReady(ctx, s.APIAdminURL) == nil && isReady(ctx, s.RelayAdminURL) == nil
}
