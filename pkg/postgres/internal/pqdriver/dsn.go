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

// errMalformedDSN replaces the errors of parsers. They quote what they could not read,
// often the password: https://github.com/lib/pq/blob/v1.12.3/connector.go#L749 and
// https://github.com/lib/pq/blob/v1.12.3/connector.go#L1115.
var errMalformedDSN = errors.New("not a PostgreSQL DSN: neither a postgres:// URL nor key=value pairs " +
	"(special characters of a password are percent-encoded in a URL and quoted in a pair)")

// parameterName matches the name of a setting of the server. lib/pq sends any unknown
// key to the server as a setting, also the scheme of another database's URL.
var parameterName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)

// CheckDSN returns an error if NewConnector refuses the DSN. The error's text holds no
// part of the DSN that could be a secret.
func CheckDSN(dsn string) error {
	_, err := withDefaults(dsn, "")
	return err
}

// withDefaults returns the DSN, in its own form, with other defaults than lib/pq's:
//   - binary_parameters, because a statement with parameters takes two round trips
//     without it: https://github.com/lib/pq/issues/636.
//   - connect_timeout, which lib/pq does not limit.
//   - the application's name.
//
// What the DSN or the environment sets is left as it is.
func withDefaults(dsn, applicationName string) (string, error) {
	if strings.TrimSpace(dsn) == "" {
		return "", errors.New("the PostgreSQL DSN is empty")
	}
	// Of two pairs with the same key the later one wins, so a default comes first. A URL
	// gets a default only if it does not have the key.
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

// dsnError replaces an error of lib/pq's parser. Its other errors name a setting and
// why the value is invalid.
func dsnError(err error) error {
	if !strings.HasPrefix(err.Error(), "pq: ") {
		return errMalformedDSN
	}
	return fmt.Errorf("not a usable PostgreSQL DSN: %w", err)
}
