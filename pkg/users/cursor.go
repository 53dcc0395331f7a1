package users

import (
	"encoding/base64"
	"errors"

	"github.com/google/uuid"
)

// cursorVersion is the first byte of every cursor. A cursor for a different sort order
// needs a different version.
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
		// Formatting the id again detects a different version and a different encoding
		// of the id.
		if last := uuid.UUID(decoded[1:]); formatCursor(last) == cursor {
			return last, nil
		}
	}
	return uuid.UUID{}, errors.New("must be the next_cursor of an earlier page")
}
