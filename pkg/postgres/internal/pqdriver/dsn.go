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

// errMalformedDSN takes the place of parsers' errors, which quote what they
// could not read: often the password.
var errMalformedDSN = errors.New("not a PostgreSQL DSN: neither a postgres:// URL nor key=value pairs " +
	"(special characters of a password are percent-encoded in a URL and quoted in a pair)")

// parameterName is what may name a parameter of the server's. A URL with
// another scheme reads as a pair with a strange key.
var parameterName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)

// CheckDSN returns an error if a pool cannot be opened with the DSN. Its text
// holds no part of the DSN that could be a secret.
func CheckDSN(dsn string) error {
	_, err := withDefaults(dsn, "")
	return err
}

// withDefaults completes a DSN, in its own form, with what it and the
// environment leave out.
func withDefaults(dsn, applicationName string) (string, error) {
	if strings.TrimSpace(dsn) == "" {
		return "", errors.New("the PostgreSQL DSN is empty")
	}
	// A later pair overrides an earlier one, so a default comes first; in a URL
	// it must not come at all.
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

// dsnError lets lib/pq's own errors through, which name a setting and what is
// wrong with its value, and none of its parser's.
func dsnError(err error) error {
	if !strings.HasPrefix(err.Error(), "pq: ") {
		return errMalformedDSN
	}
	return fmt.Errorf("not a usable PostgreSQL DSN: %w", err)
}
