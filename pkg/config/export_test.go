package config

// Key is the documentation of a configuration key.
type Key struct {
	Name, Variable, Default, Usage string
	Required                       bool
}

// APIKeys and RelayKeys return the keys of a program in order.
func APIKeys() []Key   { return export(new(API).keys()) }
func RelayKeys() []Key { return export(new(Relay).keys()) }

func export(keys []key) []Key {
	exported := make([]Key, len(keys))
	for i, k := range keys {
		exported[i] = Key{k.name, k.variable(), k.fallback, k.usage, k.required}
	}
	return exported
}
