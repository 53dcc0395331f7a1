package chserver

import (
	"bytes"
	"context"
	"fmt"
	"strings"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// version is the engine's version and time zone.
type version struct {
	major, minor, patch int
	text, timezone      string
}

func readVersion(engine *chengine.Engine) (version, error) {
	session, err := engine.NewSession()
	if err != nil {
		return version{}, err
	}
	defer session.Close()
	result, err := session.QueryWhole(context.Background(), chengine.Statement{
		SQL:    "SELECT version(), timezone()",
		Format: "TabSeparated",
	})
	if err != nil {
		return version{}, fmt.Errorf("read the engine's version: %w", err)
	}
	defer result.Close()
	line, err := result.Next()
	if err != nil {
		return version{}, fmt.Errorf("read the engine's version: %w", err)
	}

	text, timezone, _ := strings.Cut(string(bytes.TrimSpace(line)), "\t")
	v := version{text: text, timezone: timezone}
	if _, err := fmt.Sscanf(text, "%d.%d.%d", &v.major, &v.minor, &v.patch); err != nil {
		return version{}, fmt.Errorf("parse the engine's version %q: %w", text, err)
	}
	return v, nil
}
