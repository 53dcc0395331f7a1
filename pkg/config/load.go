package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cast"
	"github.com/spf13/pflag"
	"github.com/spf13/viper"
)

// LoadOptions selects the sources of a configuration. The environment is always
// read.
type LoadOptions struct {
	// File is the path of a YAML file. If it is empty, no file is read.
	File string
	// Flags holds the parsed flags of AddAPIFlags or AddRelayFlags. Flags that are
	// set override all other sources. It can be nil.
	Flags *pflag.FlagSet
	// Offline allows required keys to be empty, for commands that do not connect.
	Offline bool
}

// Error describes an invalid configuration in one line. It contains no secrets.
type Error struct {
	// Key is the invalid key, in the form section.key. It is empty if the file cannot
	// be read.
	Key string
	// Problem follows the name of the key in the error text.
	Problem string
}

// Error implements error.
func (e *Error) Error() string {
	if e.Key == "" {
		return e.Problem
	}
	return fmt.Sprintf("%s (%s) %s", e.Key, key{name: e.Key}.variable(), e.Problem)
}

func problem(name, format string, args ...any) *Error {
	return &Error{Key: name, Problem: fmt.Sprintf(format, args...)}
}

// LoadAPI returns the API's configuration, or an *Error. It also returns the names
// of unknown environment variables that begin with DIEHARD_, sorted.
//
// An empty environment variable counts as unset.
func LoadAPI(o LoadOptions) (c API, unknown []string, err error) {
	if err := load(c.keys(), o); err != nil {
		return API{}, nil, err
	}
	if err := c.check(); err != nil {
		return API{}, nil, err
	}
	return c, unknownVariables(), nil
}

// LoadRelay is LoadAPI for the configuration of the relay.
func LoadRelay(o LoadOptions) (c Relay, unknown []string, err error) {
	if err := load(c.keys(), o); err != nil {
		return Relay{}, nil, err
	}
	if err := c.check(); err != nil {
		return Relay{}, nil, err
	}
	return c, unknownVariables(), nil
}

// AddAPIFlags adds a flag for each of the API's keys.
func AddAPIFlags(flags *pflag.FlagSet) { addFlags(flags, new(API).keys()) }

// AddRelayFlags adds a flag for each of the relay's keys.
func AddRelayFlags(flags *pflag.FlagSet) { addFlags(flags, new(Relay).keys()) }

func addFlags(flags *pflag.FlagSet, keys []key) {
	for _, k := range keys {
		flags.String(k.flag(), k.fallback, k.usage)
	}
}

func load(keys []key, o LoadOptions) error {
	v := viper.New()
	for _, k := range keys {
		v.SetDefault(k.name, k.fallback)
		if err := v.BindEnv(k.name, k.variable()); err != nil {
			return fmt.Errorf("bind the environment: %w", err)
		}
		if o.Flags == nil {
			continue
		}
		if err := v.BindPFlag(k.name, o.Flags.Lookup(k.flag())); err != nil {
			return fmt.Errorf("bind the flags: %w", err)
		}
	}
	if o.File != "" {
		if err := readFile(v, keys, o.File); err != nil {
			return err
		}
	}
	for _, k := range keys {
		given, err := cast.ToStringE(v.Get(k.name))
		if err != nil {
			return problem(k.name, "must be a single value")
		}
		if content, ok, err := k.readFile(); err != nil {
			return problem(k.name, "%s", err)
		} else if ok && (o.Flags == nil || !o.Flags.Changed(k.flag())) {
			given = content
		}
		given = strings.TrimSpace(given)
		if k.required && given == "" && !o.Offline {
			return problem(k.name, "is required")
		}
		if err := k.set(given); err != nil {
			return problem(k.name, "%s", err)
		}
	}
	return nil
}

// readFile merges the values of the file into v. Environment variables override them.
// It returns an error if the file has an unknown key.
func readFile(v *viper.Viper, keys []key, path string) error {
	file := viper.New()
	file.SetConfigFile(path)
	file.SetConfigType("yaml")
	if err := file.ReadInConfig(); err != nil {
		if parse, ok := errors.AsType[viper.ConfigParseError](err); ok {
			err = fmt.Errorf("parse %s: %w", path, parse.Unwrap())
		}
		return &Error{Problem: oneLine(err.Error())}
	}
	given := file.AllKeys()
	slices.Sort(given)
	for _, name := range given {
		if slices.ContainsFunc(keys, func(k key) bool {
			// If all keys of a section are commented out, viper reports the section
			// as a key without a value.
			return k.name == name || strings.HasPrefix(k.name, name+".") && file.Get(name) == nil
		}) {
			continue
		}
		if slices.ContainsFunc(allKeys(), func(k key) bool { return k.name == name }) {
			return &Error{Problem: fmt.Sprintf("%s in %s is a key of the other program", name, path)}
		}
		return &Error{Problem: fmt.Sprintf("%s in %s is an unknown key", name, path)}
	}
	if err := v.MergeConfigMap(file.AllSettings()); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// maxSecret bounds the content of a file with a secret.
const maxSecret = 1 << 20

// readFile returns the content of the file that the variable of the key with the suffix
// _FILE names, if it is set. Only secrets have such a variable.
func (k key) readFile() (content string, ok bool, err error) {
	path := os.Getenv(k.fileVariable())
	if k.mask == nil || path == "" {
		return "", false, nil
	}
	if os.Getenv(k.variable()) != "" {
		return "", false, fmt.Errorf("is also set by %s: unset one of them", k.fileVariable())
	}
	file, err := os.Open(path) //nolint:gosec // the operator's own file
	if err != nil {
		return "", false, fmt.Errorf("cannot be read from %s: %w", k.fileVariable(), err)
	}
	defer file.Close()
	read, err := io.ReadAll(io.LimitReader(file, maxSecret))
	if err != nil {
		return "", false, fmt.Errorf("cannot be read from %s: %w", k.fileVariable(), err)
	}
	content = strings.TrimSpace(string(read))
	if content == "" {
		return "", false, fmt.Errorf("cannot be read from %s: the file %s is empty", k.fileVariable(), path)
	}
	return content, true, nil
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// allKeys returns the keys of both programs. Shared keys appear twice.
func allKeys() []key { return append(new(API).keys(), new(Relay).keys()...) }

// developmentPrefix is the prefix of the variables of tools/devstack.
const developmentPrefix = variablePrefix + "DEV"

// unknownVariables accepts the variables of both programs because one environment
// often serves both.
func unknownVariables() []string {
	var unknown []string
	for _, assignment := range os.Environ() {
		name, _, _ := strings.Cut(assignment, "=")
		if !strings.HasPrefix(name, variablePrefix) || strings.HasPrefix(name, developmentPrefix) {
			continue
		}
		if !slices.ContainsFunc(allKeys(), func(k key) bool {
			return k.variable() == name || k.mask != nil && k.fileVariable() == name
		}) {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	return unknown
}
