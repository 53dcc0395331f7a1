package store

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"
)

// Member is a relay of the fleet, as it has reported itself.
type Member struct {
	ID      uuid.UUID `db:"relay_id" json:"relay_id"`
	Host    string    `db:"host"     json:"host"`
	PID     int       `db:"pid"      json:"pid"`
	Version string    `db:"version"  json:"version"`
	// Settings are the settings that should be equal in the fleet, by their keys.
	Settings  MemberSettings `db:"settings"   json:"settings"`
	State     MemberState    `db:"state"      json:"state"`
	StartedAt time.Time      `db:"started_at" json:"started_at"`
	SeenAt    time.Time      `db:"seen_at"    json:"seen_at"`
	// SilentSeconds is the time since the last report, by PostgreSQL's clock.
	SilentSeconds float64 `db:"silent_seconds" json:"silent_seconds"`
}

// MemberSettings are settings by their keys.
type MemberSettings map[string]string

// Scan implements sql.Scanner.
func (m *MemberSettings) Scan(value any) error { return scanJSON(value, m) }

// MemberState is what a relay does.
type MemberState struct {
	// Ready is empty if the relay is ready, and otherwise the reason, as on /readyz.
	Ready string `json:"ready,omitempty"`
	// Circuit is the state of the circuit breaker: closed, open, probing or trial. Since
	// is the beginning of the outage, and NextProbe the time of the next probe, if the
	// circuit breaker is open.
	Circuit   string    `json:"circuit"`
	Since     time.Time `json:"since,omitzero"`
	NextProbe time.Time `json:"next_probe,omitzero"`
	// Stopped says that the relay delivers nothing because of Ready. If a relay is not
	// ready and not stopped, it delivers other batches.
	Stopped bool `json:"stopped,omitempty"`
	// Busy is the number of the Workers that deliver a batch.
	Busy    int `json:"busy"`
	Workers int `json:"workers"`
	// EventsPerSecond is the rate of delivered events since the report before.
	EventsPerSecond float64 `json:"events_per_second"`
	// HorizonSeconds is the age of PostgreSQL's oldest snapshot, if this relay has looked
	// for it.
	HorizonSeconds float64 `json:"horizon_seconds,omitempty"`
}

// Scan implements sql.Scanner.
func (m *MemberState) Scan(value any) error { return scanJSON(value, m) }

func scanJSON(value, into any) error {
	text, ok := value.([]byte)
	if !ok {
		return fmt.Errorf("a JSON column contains %T", value)
	}
	return json.Unmarshal(text, into) //nolint:wrapcheck // database/sql adds the column
}

const (
	// memberTimeout is the time after which a silent relay does not count as running. It is
	// three reports.
	memberTimeout = time.Minute
	// memberRetention is the time after which the row of a silent relay is deleted.
	memberRetention = time.Hour

	reportSQL = `
WITH old AS (
    DELETE FROM {schema}outbox_relays WHERE seen_at < clock_timestamp() - make_interval(secs => $7)
)
INSERT INTO {schema}outbox_relays (relay_id, host, pid, version, settings, state) VALUES ($1, $2, $3, $4, $5::jsonb, $6::jsonb)
ON CONFLICT (relay_id) DO UPDATE SET state = excluded.state, settings = excluded.settings, seen_at = excluded.seen_at`

	leaveSQL = `DELETE FROM {schema}outbox_relays WHERE relay_id = $1`

	fleetSQL = `
SELECT relay_id, host, pid, version, settings, state, started_at, seen_at,
       greatest(extract(epoch FROM clock_timestamp() - seen_at), 0)::float8 AS silent_seconds
FROM {schema}outbox_relays
ORDER BY started_at, relay_id`
)

// IsSilent returns whether the relay has not reported itself for a minute.
func (m *Member) IsSilent() bool { return seconds(m.SilentSeconds) > memberTimeout }

// Report writes the row of a relay, and deletes the rows of relays that are silent for an
// hour.
func (s *Store) Report(ctx context.Context, m Member) error {
	settings, err := json.Marshal(m.Settings)
	if err != nil {
		return fmt.Errorf("report to the fleet: %w", err)
	}
	state, err := json.Marshal(m.State)
	if err != nil {
		return fmt.Errorf("report to the fleet: %w", err)
	}
	if _, err := s.exec(ctx, reportSQL, m.ID, m.Host, m.PID, m.Version,
		string(settings), string(state), memberRetention.Seconds()); err != nil {
		return fmt.Errorf("report to the fleet: %w", err)
	}
	return nil
}

// Leave deletes the row of a relay that stops.
func (s *Store) Leave(ctx context.Context, id uuid.UUID) error {
	if _, err := s.exec(ctx, leaveSQL, id); err != nil {
		return fmt.Errorf("leave the fleet: %w", err)
	}
	return nil
}

// Fleet returns the relays that have reported themselves within an hour, the oldest first.
func (s *Store) Fleet(ctx context.Context) ([]Member, error) {
	var members []Member
	if err := s.selectAll(ctx, &members, fleetSQL); err != nil {
		return nil, fmt.Errorf("read the fleet: %w", err)
	}
	for i := range members {
		members[i].StartedAt, members[i].SeenAt = members[i].StartedAt.UTC(), members[i].SeenAt.UTC()
	}
	return members, nil
}

// Running returns the members that are not silent.
func Running(members []Member) []Member {
	return slices.DeleteFunc(slices.Clone(members), func(m Member) bool { return m.IsSilent() })
}

// Configurations returns the members by their settings, the most frequent settings first.
// Members with equal settings are together. The result has one element if the fleet has
// one configuration.
func Configurations(members []Member) [][]Member {
	var groups [][]Member
	for _, m := range members {
		i := slices.IndexFunc(groups, func(group []Member) bool { return maps.Equal(group[0].Settings, m.Settings) })
		if i < 0 {
			groups = append(groups, nil)
			i = len(groups) - 1
		}
		groups[i] = append(groups[i], m)
	}
	slices.SortStableFunc(groups, func(a, b []Member) int { return len(b) - len(a) })
	return groups
}
