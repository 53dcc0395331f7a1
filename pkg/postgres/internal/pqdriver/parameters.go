package pqdriver

import (
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/lib/pq"
)

// lib/pq sends each unknown parameter of the DSN to the server as a setting
// (https://github.com/lib/pq/blob/v1.12.3/connector.go#L432). The server then refuses
// every connection. Hosting providers and other drivers put parameters into their DSNs
// that are not settings of the server. These parameters are removed if the meaning of the
// DSN stays the same. Otherwise the DSN is refused with the parameter's name.

// ignoredParameters configure the pools, caches and protocols of other drivers.
var ignoredParameters = []string{
	// libpq: this program has its own keepalives.
	"keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "sslcompression",
	// Prisma and Supabase
	"connection_limit", "pgbouncer", "pool_timeout", "socket_timeout", "statement_cache_size",
	// Vercel
	"supa",
	// node-postgres
	"uselibpqcompat",
	// pgx
	"default_query_exec_mode", "description_cache_capacity", "pool_health_check_period", "pool_max_conn_idle_time",
	"pool_max_conn_lifetime", "pool_max_conn_lifetime_jitter", "pool_max_conns", "pool_min_conns", "pool_min_idle_conns",
	"statement_cache_capacity",
}

// harmlessValues are values of security parameters that require nothing.
var harmlessValues = map[string][]string{
	"channel_binding": {"disable", "prefer"}, // lib/pq does not implement channel binding
	"gssencmode":      {"disable", "prefer"},
}

const useSSLMode = "use sslmode, sslrootcert, sslcert and sslkey instead"

// refusedParameters would change the meaning of the DSN if they were ignored. The values
// say what to do.
var refusedParameters = map[string]string{
	"channel_binding": "remove it and set sslmode=verify-full and sslrootcert=system, which also authenticates the server",
	"currentSchema":   "remove it and set postgres.schema",
	"gssencmode":      "remove it and use TLS",
	"replication":     "remove it",
	"require_auth":    "remove it and set sslmode=verify-full, which authenticates the server",
	"requirepeer":     "remove it",
	"requiressl":      useSSLMode,
	"schema":          "remove it and set postgres.schema",
	"ssl":             useSSLMode,
	"sslaccept":       useSSLMode,
	"sslcertmode":     "remove it",
	"sslcrl":          "remove it; certificate revocation lists are not checked",
	"sslcrldir":       "remove it; certificate revocation lists are not checked",
	"sslidentity":     useSSLMode,
	"sslpassword":     "remove it and decrypt the key",
}

func isIgnored(name, value string) bool {
	return slices.Contains(ignoredParameters, name) || slices.Contains(harmlessValues[name], value)
}

// checkParameters returns an error if the DSN has a parameter that cannot be ignored.
func checkParameters(config pq.Config) error {
	for _, name := range slices.Sorted(maps.Keys(config.Runtime)) {
		remedy, refused := refusedParameters[name]
		if refused && !isIgnored(name, config.Runtime[name]) {
			return fmt.Errorf("an invalid PostgreSQL DSN: the parameter %s is not supported: %s", name, remedy)
		}
	}
	return nil
}

// IgnoredParameters returns the names of the parameters in the DSN that are ignored. The
// DSN must be valid.
func IgnoredParameters(dsn string) []string {
	var ignored []string
	dsn, err := withHosts(dsn)
	if err != nil {
		return nil
	}
	config, err := pq.NewConfig(dsn)
	if err != nil {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(config.Runtime)) {
		if isIgnored(name, config.Runtime[name]) {
			ignored = append(ignored, name)
		}
	}
	return ignored
}

// pair matches a key=value pair as lib/pq parses it.
var pair = regexp.MustCompile(`(?s)([^\s=]+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s\\]|\\.)*)`)

// withoutIgnored removes the ignored parameters from a valid DSN.
func withoutIgnored(dsn string) string {
	ignored := IgnoredParameters(dsn)
	if len(ignored) == 0 {
		return dsn
	}
	if isURL(dsn) {
		address, err := url.Parse(dsn)
		if err != nil {
			return dsn
		}
		query := address.Query()
		for _, name := range ignored {
			query.Del(name)
		}
		address.RawQuery = query.Encode()
		return address.String()
	}
	return pair.ReplaceAllStringFunc(dsn, func(found string) string {
		name, _, _ := strings.Cut(found, "=")
		if slices.Contains(ignored, strings.TrimSpace(name)) {
			return ""
		}
		return found
	})
}
