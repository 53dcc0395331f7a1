package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// State is the content of the file by which other programs find a running stack.
type State struct {
	PID               int    `json:"pid"` // of the devstack program
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

// ReadState reads the state of the stack in a folder. It returns os.ErrNotExist
// if no stack is ready there.
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

// writeState writes the file in one step, so that no reader sees an incomplete file. The
// file contains passwords.
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
		return err //nolint:wrapcheck // the error names the file
	}
	return nil
}

// Answers reports whether the stack is running and ready.
func (s State) Answers(ctx context.Context) bool {
	return isReady(ctx, s.APIAdminURL) == nil && isReady(ctx, s.RelayAdminURL) == nil
}
