package config

import (
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// WriteYAML writes the configuration in the format that LoadAPI reads, with
// secrets masked.
func (c *API) WriteYAML(w io.Writer) error { return writeYAML(w, c.keys()) }

// WriteJSON writes the configuration as one JSON object, with secrets masked.
func (c *API) WriteJSON(w io.Writer) error { return writeJSON(w, c.keys()) }

// WriteYAML writes the configuration in the format that LoadRelay reads, with
// secrets masked.
func (c *Relay) WriteYAML(w io.Writer) error { return writeYAML(w, c.keys()) }

// WriteJSON writes the configuration as one JSON object, with secrets masked.
func (c *Relay) WriteJSON(w io.Writer) error { return writeJSON(w, c.keys()) }

const indent = 2

func writeYAML(w io.Writer, keys []key) error {
	encoder := yaml.NewEncoder(w)
	encoder.SetIndent(indent)
	if err := encoder.Encode(effective(keys)); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	if err := encoder.Close(); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	return nil
}

func writeJSON(w io.Writer, keys []key) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", strings.Repeat(" ", indent))
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(effective(keys)); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	return nil
}

// effective returns the values by section and key, in the format of the file.
func effective(keys []key) map[string]any {
	root := map[string]any{}
	for _, k := range keys {
		value := k.get()
		if text, ok := value.(string); ok && k.mask != nil && text != "" {
			value = k.mask(text)
		}
		section, name, ok := strings.Cut(k.name, ".")
		if !ok {
			root[k.name] = value
			continue
		}
		values, ok := root[section].(map[string]any)
		if !ok {
			values = map[string]any{}
			root[section] = values
		}
		values[name] = value
	}
	return root
}

const masked = "xxxxx"

var (
	// secretParameter matches the names of parameters that can hold a secret.
	secretParameter = regexp.MustCompile(`(?i)pass|secret|token|key|jwt|auth|proxy|cert`)
	// pair matches a key=value pair of libpq's connection string.
	pair = regexp.MustCompile(`([^\s=]+)\s*=\s*('(?:\\.|[^'\\])*'|(?:\\.|[^\s\\])*)`)
)

// maskAll masks a value that is a secret as a whole.
func maskAll(value string) string {
	if value == "" {
		return ""
	}
	return masked
}

// maskAPIKeys masks the digests and keeps the names. The digest of a weak key
// reveals the key.
func maskAPIKeys(keys string) string {
	return digestPattern.ReplaceAllString(keys, masked)
}

var digestPattern = regexp.MustCompile(`[0-9a-f]{64}`)

// maskDSN masks the secrets of a database DSN in any form. If it cannot parse the
// DSN, it masks more than necessary.
func maskDSN(dsn string) string {
	scheme, rest, isURL := strings.Cut(dsn, "://")
	if !isURL || strings.ContainsAny(scheme, " =") {
		return maskPairs(dsn)
	}
	authority, tail := rest, ""
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		authority, tail = rest[:i], rest[i:]
	}
	if strings.ContainsAny(tail, "@#") {
		return scheme + "://" + masked // the apparent path can be the end of a password
	}
	if at := strings.LastIndex(authority, "@"); at >= 0 {
		if user, _, ok := strings.Cut(authority[:at], ":"); ok {
			authority = user + ":" + masked + authority[at:]
		}
	}
	path, query, hasQuery := strings.Cut(tail, "?")
	if !hasQuery {
		return scheme + "://" + authority + path
	}
	parameters := strings.Split(query, "&")
	for i, parameter := range parameters {
		if name, _, _ := strings.Cut(parameter, "="); secretParameter.MatchString(name) {
			parameters[i] = name + "=" + masked
		}
	}
	return scheme + "://" + authority + path + "?" + strings.Join(parameters, "&")
}

func maskPairs(dsn string) string {
	rest := pair.ReplaceAllString(dsn, "")
	if strings.TrimSpace(rest) != "" {
		return masked
	}
	return pair.ReplaceAllStringFunc(dsn, func(text string) string {
		name, _, _ := strings.Cut(text, "=")
		if secretParameter.MatchString(name) {
			return strings.TrimSpace(name) + "=" + masked
		}
		return text
	})
}

// maskSentryDSN masks the keys of the project, which are in the user part of the
// URL.
func maskSentryDSN(dsn string) string {
	scheme, rest, _ := strings.Cut(dsn, "://")
	return scheme + "://" + masked + rest[max(strings.LastIndex(rest, "@"), 0):]
}
