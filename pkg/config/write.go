package config

import (
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// WriteYAML writes the configuration as a file that LoadAPI would read, with
// its secrets masked.
func (c *API) WriteYAML(w io.Writer) error { return writeYAML(w, c.keys()) }

// WriteJSON writes the configuration as one JSON object, with its secrets
// masked.
func (c *API) WriteJSON(w io.Writer) error { return writeJSON(w, c.keys()) }

// WriteYAML writes the configuration as a file that LoadRelay would read, with
// its secrets masked.
func (c *Relay) WriteYAML(w io.Writer) error { return writeYAML(w, c.keys()) }

// WriteJSON writes the configuration as one JSON object, with its secrets
// masked.
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

// effective returns the values by section and key, as a file has them.
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
	// secretParameter is the name of a parameter that holds a secret, or may.
	secretParameter = regexp.MustCompile(`(?i)pass|secret|token|key|jwt|auth|proxy|cert`)
	// pair is one of the key=value pairs of libpq's form.
	pair = regexp.MustCompile(`([^\s=]+)\s*=\s*('(?:\\.|[^'\\])*'|(?:\\.|[^\s\\])*)`)
)

// maskAPIKeys leaves the names: a digest of a key that is easy to guess tells it.
func maskAPIKeys(keys string) string {
	return digestPattern.ReplaceAllString(keys, masked)
}

var digestPattern = regexp.MustCompile(`[0-9a-f]{64}`)

// maskDSN hides the secrets of a database's DSN, of whatever form. In doubt it
// hides more.
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
		return scheme + "://" + masked // what looks like a path may be the rest of a password
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

// maskSentryDSN hides the project's keys, which stand where a URL has its user.
func maskSentryDSN(dsn string) string {
	scheme, rest, _ := strings.Cut(dsn, "://")
	return scheme + "://" + masked + rest[max(strings.LastIndex(rest, "@"), 0):]
}
