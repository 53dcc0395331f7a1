package users

import (
	"encoding/base64"
	"errors"

	"github.com/google/uuid"
)

// cursorVersion is the first byte of every cursor. A later order with another key needs
// another version.
const cursorVersion = 1

// formatCursor returns the cursor of the page after the user with the id.
func formatCursor(last uuid.UUID) string {
	return base64.RawURLEncoding.EncodeToString(append([]byte{cursorVersion}, last[:]...))
}

// parseCursor returns the exclusive upper bound of the page's ids. For an empty cursor
// it returns uuid.Max, which is above every UUID v7.
func parseCursor(cursor string) (uuid.UUID, error) {
	if cursor == "" {
		return uuid.Max, nil
	}
	decoded, err := base64.RawURLEncoding.DecodeString(cursor)
	if err == nil && len(decoded) == 1+len(uuid.UUID{}) {
		// Formatting it again detects another version and another spelling.
		if last := uuid.UUID(decoded[1:]); formatCursor(last) == cursor {
			return last, nil
		}
	}
	return uuid.UUID{}, errors.New("must be the next_cursor of an earlier page")
}
