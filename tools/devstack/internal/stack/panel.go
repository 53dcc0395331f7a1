package stack

import (
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// Panel returns the addresses and commands that a user of a running stack
// needs.
func (s *Stack) Panel() string {
	state := s.state
	// The e-mail address differs each time, because addresses are unique and earlier
	// users stay in the database.
	unique := strconv.FormatInt(time.Now().Unix(), 36)
	var b strings.Builder
	row := func(name, value string) { fmt.Fprintf(&b, "  %-17s %s\n", name, value) }
	fmt.Fprintf(&b, "\nDiehard is up.\n\n")
	row("API", state.APIURL)
	row("API, admin", state.APIAdminURL+"  (/livez, /readyz, /metrics)")
	row("Relay, admin", state.RelayAdminURL+"  (/livez, /readyz, /metrics)")
	row("PostgreSQL", state.PostgresDSN)
	row("ClickHouse, HTTP", state.ClickHouseHTTPDSN)
	row("ClickHouse", state.ClickHouseDSN)
	fmt.Fprintf(&b, "\nCreate a user:\n\n  curl -i %s/v1/users -H 'Content-Type: application/json' -d '%s'\n",
		state.APIURL, `{"email": "ada.`+unique+`@example.com", "first_name": "Ada", "last_name": "Lovelace"}`)
	fmt.Fprintf(&b, "\nSee its event in ClickHouse:\n\n  curl '%s' -d '%s'\n",
		ClickHouseURL(state.ClickHouseHTTPDSN), "SELECT * FROM "+state.EventTable+" ORDER BY event_date_time DESC LIMIT 5 FORMAT PrettyCompact")
	fmt.Fprintf(&b, "\nCtrl-C stops everything. The data stay in %s.\n\n", s.options.Dir)
	return b.String()
}

// ClickHouseURL returns the address of the HTTP interface. The database is a parameter
// of this address; in a DSN it is the path.
func ClickHouseURL(dsn string) string {
	u, err := url.Parse(dsn)
	if err != nil {
		return dsn
	}
	database := strings.TrimPrefix(u.Path, "/")
	u.Path = "/"
	u.RawQuery = url.Values{"database": {database}}.Encode()
	return u.String()
}

// eventTable returns the configured table in ClickHouse.
func eventTable() string {
	if table := os.Getenv("DIEHARD_CLICKHOUSE_TABLE"); table != "" {
		return table
	}
	return "event_log"
}
