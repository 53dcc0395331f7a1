package users

import (
	"encoding/base64"
	"errors"

	"github.com/google/uuid"
)

// cursorVersion leads every cursor, so that an order with another key can be
// told from this one later.
const cursorVersion = 1

// formatCursor returns the cursor of the page that follows the user with the
// id.
func formatCursor(last uuid.UUID) string {
	return base64.RawURLEncoding.EncodeToString(append([]byte{cursorVersion}, last[:]...))
}

// parseCursor returns the id that the page's ids are below. No cursor is above
// every id: a UUID v7 is never the highest one.
func parseCursor(cursor string) (uuid.UUID, error) {
	if cursor == "" {
		return uuid.Max, nil
	}
	decoded, err := base64.RawURLEncoding.DecodeString(cursor)
	if err == nil && len(decoded) == 1+len(uuid.UUID{}) {
		// Formatting again finds another version, and another spelling.
		if last := uuid.UUID(decoded[1:]); formatCursor(last) == cursor {
			return last, nil
		}
	}
	return uuid.UUID{}, errors.New("must be the next_cursor of an earlier page")
}
