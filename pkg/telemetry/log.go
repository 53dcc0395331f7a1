// Package telemetry provides logs with slog, reports errors and transactions to Sentry, and
// exports spans of OpenTelemetry.
//
// To report an error, log a record of the level ERROR with the attribute "err" and the
// context of the failed operation. The record goes to the log and, if Sentry is on, to
// Sentry.
package telemetry

import (
	"fmt"
	"io"
	"log/slog"
)

// Format is the format of log records.
type Format string

// The formats of a record: a JSON object or a line of key=value pairs.
const (
	JSON Format = "json"
	Text Format = "text"
)

// LogOptions configures a logger.
type LogOptions struct {
	// Level is the minimum level of records.
	Level slog.Level
	// Format defaults to JSON.
	Format Format
}

// NewLogger returns a logger that writes to w. It also reports errors to Sentry, if
// StartSentry has turned Sentry on. In JSON, durations are numbers of seconds.
func NewLogger(w io.Writer, o LogOptions) *slog.Logger {
	var handler slog.Handler
	switch o.Format {
	case Text:
		handler = slog.NewTextHandler(w, &slog.HandlerOptions{Level: o.Level})
	default:
		handler = slog.NewJSONHandler(w, &slog.HandlerOptions{Level: o.Level, ReplaceAttr: durationInSeconds})
	}
	return slog.New(&sentryHandler{next: handler})
}

func durationInSeconds(_ []string, attr slog.Attr) slog.Attr {
	if attr.Value.Kind() == slog.KindDuration {
		attr.Value = slog.Float64Value(attr.Value.Duration().Seconds())
	}
	return attr
}

// ParseLevel returns the level with the name debug, info, warn or error.
func ParseLevel(name string) (slog.Level, error) {
	switch name {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	default:
		return 0, fmt.Errorf("unknown level %q: must be debug, info, warn or error", name)
	}
}
