// Package scope names the rights of API keys.
package scope

const (
	// ReadUsers is the right to read users, alone or as a list.
	ReadUsers = "users.read"
	// WriteUsers is the right to create, change and delete users.
	WriteUsers = "users.write"
	// PublishEvents is the right to publish events.
	PublishEvents = "events.publish"
)

// All returns all scopes.
func All() []string { return []string{ReadUsers, WriteUsers, PublishEvents} }
