package pqdriver

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strconv"
	"strings"

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

// withDefaults adds these parameters to the DSN:
//   - binary_parameters, because a statement with parameters takes two round trips
//     without it: https://github.com/lib/pq/issues/636.
//   - connect_timeout, because lib/pq waits without a limit by default.
//   - fallback_application_name, the name of the program.
//
// It keeps the form of the DSN. Parameters in the DSN and in the environment override
// the added parameters.
func withDefaults(dsn, applicationName string) (string, error) {
	if strings.TrimSpace(dsn) == "" {
		return "", errors.New("the PostgreSQL DSN is empty")
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

	complete("binary_parameters", "yes")
	if config.ConnectTimeout <= 0 {
		complete("connect_timeout", strconv.Itoa(int(DefaultConnectTimeout.Seconds())))
	}
	if applicationName != "" {
		complete("fallback_application_name", applicationName)
	}
	return dsn, nil
}

func isURL(dsn string) bool {
	return strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://")
}

// dsnError replaces errors of lib/pq's parser. It keeps errors that name an invalid
// setting.
func dsnError(err error) error {
	if !strings.HasPrefix(err.Error(), "pq: ") {
		return errMalformedDSN
	}
	return fmt.Errorf("an invalid PostgreSQL DSN: %w", err)
}
