package main

import (
	"os"
	"strconv"

	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// member describes this process to the fleet. It has the settings that should be equal in
// the fleet, because each relay cuts batches and judges failing events for all relays.
func member(version string, c *config.Relay) store.Member {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return store.Member{
		ID: uuid.New(), Host: host, PID: os.Getpid(), Version: version,
		Settings: store.MemberSettings{
			"housekeeping.audit_retention":       c.Housekeeping.AuditRetention.String(),
			"housekeeping.dead_letter_retention": c.Housekeeping.DeadLetterRetention.String(),
			"housekeeping.vacuum":                c.Housekeeping.Vacuum,
			"clickhouse.cluster":                 c.ClickHouse.Cluster,
			"clickhouse.table":                   c.ClickHouse.Table,
			"relay.batch_max_bytes":              strconv.FormatInt(c.Relay.BatchMaxBytes, 10),
			"relay.batch_max_rows":               strconv.Itoa(c.Relay.BatchMaxRows),
			"relay.dead_letter_after":            c.Relay.DeadLetterAfter.String(),
			"relay.dead_letter_attempts":         strconv.Itoa(c.Relay.DeadLetterAttempts),
			"relay.dead_letters_per_hour":        strconv.Itoa(c.Relay.DeadLettersPerHour),
			"relay.flush_timeout":                c.Relay.FlushTimeout.String(),
			"relay.linger":                       c.Relay.Linger.String(),
		},
	}
}
