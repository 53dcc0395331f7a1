package pqdriver

import (
	"fmt"
	"net/url"
	"os"
	"strings"
)

// PasswordError says that the file has no password.
type PasswordError struct{ cause error }

func (e *PasswordError) Error() string { return "read the password: " + e.cause.Error() }

func (e *PasswordError) Unwrap() error { return e.cause }

// readPassword returns the content of the file without the line break at its end.
func readPassword(path string) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", &PasswordError{err}
	}
	password := strings.TrimRight(string(content), "\r\n")
	if password == "" {
		return "", &PasswordError{fmt.Errorf("%s is empty", path)}
	}
	return password, nil
}

// withPassword returns the DSN with the password of the file, or the DSN itself if path is
// empty. The password overrides that of the DSN.
func withPassword(dsn, path string) (string, error) {
	if path == "" {
		return dsn, nil
	}
	password, err := readPassword(path)
	if err != nil {
		return "", err
	}
	if !isURL(dsn) { // a later pair overrides an earlier pair
		return dsn + " password='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(password) + "'", nil
	}
	address, err := url.Parse(dsn)
	if err != nil {
		return "", errMalformedDSN
	}
	// lib/pq accepts a password in both places, and sorts them.
	query := address.Query()
	if user := address.User.Username(); user != "" {
		query.Del("password")
		address.User = url.UserPassword(user, password)
	} else {
		query.Set("password", password)
		address.User = nil
	}
	address.RawQuery = query.Encode()
	return address.String(), nil
}
