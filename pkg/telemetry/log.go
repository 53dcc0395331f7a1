// Package telemetry is how the programs report on themselves: logs with slog,
// errors and transactions to Sentry.
//
// There is one way to report an error: a record of the level ERROR with the
// attribute "err", logged with the context of what failed. It goes to the log
// and, where Sentry is on, to Sentry.
package telemetry

import (
	"fmt"
	"io"
	"log/slog"
)

// Format is how log records are written.
type Format string

// The formats: one JSON object or one line of key=value pairs for each record.
const (
	JSON Format = "json"
	Text Format = "text"
)

// LogOptions configure a logger.
type LogOptions struct {
	// Level is the least level that is written.
	Level slog.Level
	// Format is JSON by default.
	Format Format
}

// NewLogger returns a logger that writes to w, and to Sentry what StartSentry
// has made of it. In JSON a duration is a number of seconds.
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

// ParseLevel returns the level that debug, info, warn or error names.
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
