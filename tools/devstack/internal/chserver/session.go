package chserver

import (
	"context"
	"regexp"
	"strings"

	"github.com/ClickHouse/ch-go/proto"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// setting is a setting of one query.
type setting struct {
	name, value string
}

// quoted returns the value as a literal.
func (s setting) quoted() string {
	return "'" + stringEscape.Replace(s.value) + "'"
}

var (
	settingName  = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)
	stringEscape = strings.NewReplacer(`\`, `\\`, `'`, `\'`)
	nameEscape   = strings.NewReplacer(`\`, `\\`, "`", "\\`")
)

// setAll applies settings to the session until resetAll. The text of most statements
// cannot contain settings.
func setAll(ctx context.Context, session *chengine.Session, settings []setting) error {
	return set(ctx, session, settings, setting.quoted)
}

// resetAll resets the settings.
func resetAll(ctx context.Context, session *chengine.Session, settings []setting) error {
	return set(ctx, session, settings, func(setting) string { return "DEFAULT" })
}

func set(ctx context.Context, session *chengine.Session, settings []setting, value func(setting) string) error {
	if len(settings) == 0 {
		return nil
	}
	list, err := assign(settings, value)
	if err != nil {
		return err
	}
	return session.Exec(ctx, chengine.Statement{SQL: "SET " + list})
}

// assign returns the list that follows SET or SETTINGS.
func assign(settings []setting, value func(setting) string) (string, error) {
	assignments := make([]string, len(settings))
	for i, s := range settings {
		if !settingName.MatchString(s.name) {
			return "", newException(proto.ErrUnknownSetting, "UNKNOWN_SETTING", "Unknown setting '%s'", s.name)
		}
		assignments[i] = s.name + " = " + value(s)
	}
	return strings.Join(assignments, ", "), nil
}

// use changes the session's current database.
func use(ctx context.Context, session *chengine.Session, database string) error {
	if database == "" {
		return nil
	}
	return session.Exec(ctx, chengine.Statement{SQL: "USE " + quoteName(database)})
}

func quoteName(name string) string {
	return "`" + nameEscape.Replace(name) + "`"
}
