package pqdriver

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
)

// errMalformedDSN replaces the errors of parsers. Those errors quote the invalid text,
// often the password: https://github.com/lib/pq/blob/v1.12.3/connector.go#L749 and
// https://github.com/lib/pq/blob/v1.12.3/connector.go#L1115.
var errMalformedDSN = errors.New("not a PostgreSQL DSN: use a postgres:// URL or key=value pairs " +
	"(percent-encode special characters of a password in a URL, quote them in a pair)")

// parameterName matches the name of a setting of the server. lib/pq sends any unknown
// key to the server as a setting, even the scheme of another database's URL.
var parameterName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)

// CheckDSN returns an error if the DSN is invalid. The error contains no secrets of the
// DSN.
func CheckDSN(dsn string) error {
	_, err := withDefaults(dsn, "")
	return err
}

// withDefaults returns a DSN that lib/pq accepts. It adds these parameters to the DSN:
//   - binary_parameters, because a statement with parameters takes two round trips
//     without it: https://github.com/lib/pq/issues/636.
//   - connect_timeout, because lib/pq waits without a limit by default. The limit counts
//     for each host.
//   - target_session_attrs=read-write, if the DSN has several hosts.
//   - fallback_application_name, the name of the program.
//
// It keeps the form of the DSN. Parameters in the DSN and in the environment override
// the added parameters. It removes the parameters of other drivers that have no meaning
// here: see parameters.go.
func withDefaults(dsn, applicationName string) (string, error) {
	if strings.TrimSpace(dsn) == "" {
		return "", errors.New("the PostgreSQL DSN is empty")
	}
	dsn, err := withHosts(dsn)
	if err != nil {
		return "", err
	}
	// A later pair overrides an earlier pair, so defaults come first. In a URL, a
	// default must not repeat an existing key.
	complete := func(name, value string) { dsn = name + "=" + value + " " + dsn }
	if isURL(dsn) {
		address, err := url.Parse(dsn)
		if err != nil {
			return "", errMalformedDSN
		}
		query, err := url.ParseQuery(address.RawQuery)
		if err != nil {
			return "", errMalformedDSN
		}
		complete = func(name, value string) {
			if !query.Has(name) {
				query.Set(name, value)
				address.RawQuery = query.Encode()
				dsn = address.String()
			}
		}
	}

	config, err := pq.NewConfig(dsn)
	if err != nil {
		return "", dsnError(err)
	}
	for name := range config.Runtime {
		if !parameterName.MatchString(name) {
			return "", errMalformedDSN
		}
	}
	if err := checkHosts(config); err != nil {
		return "", err
	}
	if err := checkParameters(config); err != nil {
		return "", err
	}

	complete("binary_parameters", "yes")
	if config.ConnectTimeout <= 0 {
		complete("connect_timeout", strconv.Itoa(int(connectTimeout(len(config.Multi)+1).Seconds())))
	}
	if len(config.Multi) > 0 && config.TargetSessionAttrs == "" {
		complete("target_session_attrs", string(pq.TargetSessionAttrsReadWrite))
	}
	if applicationName != "" {
		complete("fallback_application_name", applicationName)
	}
	return withoutIgnored(dsn), nil
}

// Hosts returns the hosts and ports of the DSN, for messages. The DSN must be valid.
func Hosts(dsn string) (hosts []string) {
	dsn, err := withDefaults(dsn, "")
	if err != nil {
		return nil
	}
	config, err := pq.NewConfig(dsn)
	if err != nil {
		return nil
	}
	add := func(host string, port uint16) {
		if strings.HasPrefix(host, "/") || strings.HasPrefix(host, "@") {
			hosts = append(hosts, fmt.Sprintf("%s/.s.PGSQL.%d", host, port))
			return
		}
		hosts = append(hosts, net.JoinHostPort(host, strconv.Itoa(int(port))))
	}
	add(config.Host, config.Port)
	for _, other := range config.Multi {
		add(other.Host, other.Port)
	}
	return hosts
}

// connectTimeout returns the time limit for each of several hosts.
func connectTimeout(hosts int) time.Duration {
	const least = 2 * time.Second // as in libpq
	return max(least, DefaultConnectTimeout/time.Duration(hosts))
}

const (
	urlScheme      = "postgres://"
	urlSchemeOther = "postgresql://"
)

func isURL(dsn string) bool {
	return strings.HasPrefix(dsn, urlScheme) || strings.HasPrefix(dsn, urlSchemeOther)
}

// defaultPort is libpq's default in a list of ports.
const defaultPort = "5432"

// withHosts moves a list of hosts, or the folder of a socket (%2Ftmp), from the authority
// of a URL into the parameters host and port. lib/pq does not split the authority:
// https://github.com/lib/pq/blob/v1.12.3/connector.go#L489.
func withHosts(dsn string) (string, error) {
	if !isURL(dsn) {
		return dsn, nil
	}
	scheme, rest, _ := strings.Cut(dsn, "://")
	authority, path := rest, ""
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority, path = rest[:i], rest[i:]
	}
	user, list := "", authority
	if i := strings.LastIndex(authority, "@"); i >= 0 {
		user, list = authority[:i+1], authority[i+1:]
	}
	if !strings.Contains(list, ",") && !strings.Contains(strings.ToUpper(list), "%2F") {
		return dsn, nil
	}
	var hosts, ports []string
	anyPort := false
	for entry := range strings.SplitSeq(list, ",") {
		host, port, ok := splitHost(entry)
		if !ok {
			return "", errMalformedDSN
		}
		anyPort = anyPort || port != ""
		hosts, ports = append(hosts, host), append(ports, port)
	}
	for i := range ports {
		if ports[i] == "" {
			ports[i] = defaultPort
		}
	}
	address, err := url.Parse(scheme + "://" + user + path)
	if err != nil {
		return "", errMalformedDSN
	}
	query, err := url.ParseQuery(address.RawQuery)
	if err != nil {
		return "", errMalformedDSN
	}
	if !query.Has("host") {
		query.Set("host", strings.Join(hosts, ","))
	}
	if anyPort && !query.Has("port") { // without a port in the URL, PGPORT applies
		query.Set("port", strings.Join(ports, ","))
	}
	address.RawQuery = query.Encode()
	return address.String(), nil
}

// splitHost splits one entry of a list of hosts: HOST, HOST:PORT, [IPV6] or [IPV6]:PORT.
// An empty host is localhost, as in libpq.
func splitHost(entry string) (host, port string, ok bool) {
	if bracketed, isIPv6 := strings.CutPrefix(entry, "["); isIPv6 {
		address, rest, closed := strings.Cut(bracketed, "]")
		if _, err := netip.ParseAddr(address); err != nil || !closed {
			return "", "", false
		}
		if rest == "" {
			return address, "", true
		}
		entry = ":" + strings.TrimPrefix(rest, ":")
		host = address
	}
	name, port, hasPort := strings.Cut(entry, ":")
	if host == "" {
		var err error
		if host, err = url.PathUnescape(name); err != nil {
			return "", "", false
		}
	}
	if host == "" {
		host = "localhost"
	}
	if hasPort {
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return "", "", false
		}
	}
	return host, port, true
}

// checkHosts refuses hosts that contain a port, and servers that accept no writes.
func checkHosts(config pq.Config) error {
	hosts := make([]string, 0, len(config.Multi)+1)
	hosts = append(hosts, config.Host)
	for _, other := range config.Multi {
		hosts = append(hosts, other.Host)
	}
	for _, host := range hosts {
		isSocket := strings.HasPrefix(host, "/") || strings.HasPrefix(host, "@")
		if _, err := netip.ParseAddr(host); err != nil && !isSocket && strings.Contains(host, ":") {
			return errors.New("an invalid PostgreSQL DSN: a host contains a colon; " +
				"write several hosts as host=HOST1,HOST2 port=PORT1,PORT2, or as postgres://HOST1:PORT1,HOST2:PORT2/DATABASE")
		}
	}
	standbys := []pq.TargetSessionAttrs{
		pq.TargetSessionAttrsReadOnly, pq.TargetSessionAttrsStandby, pq.TargetSessionAttrsPreferStandby,
	}
	if slices.Contains(standbys, config.TargetSessionAttrs) {
		return fmt.Errorf("an invalid PostgreSQL DSN: target_session_attrs=%s selects a server that accepts no writes; "+
			"use read-write or primary", config.TargetSessionAttrs)
	}
	return nil
}

// dsnError replaces errors of lib/pq's parser. It keeps errors that name an invalid
// setting.
func dsnError(err error) error {
	if !strings.HasPrefix(err.Error(), "pq: ") {
		return errMalformedDSN
	}
	return fmt.Errorf("an invalid PostgreSQL DSN: %w", err)
}
