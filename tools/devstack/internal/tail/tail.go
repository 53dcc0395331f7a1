// Package tail keeps the end of a log for error messages.
package tail

import (
	"bytes"
	"strings"
	"sync"
)

// MaxBytes is the maximum size of a Buffer's content.
const MaxBytes = 16 << 10

// Buffer keeps the last MaxBytes written to it. The zero value is empty and
// ready. It is safe for concurrent use.
type Buffer struct {
	mu  sync.Mutex
	buf []byte
}

// Write implements io.Writer. It never fails.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = append(b.buf, p...)
	if over := len(b.buf) - MaxBytes; over > 0 {
		b.buf = append(b.buf[:0], b.buf[over:]...)
	}
	return len(p), nil
}

// String returns the kept text.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.buf)
}

// Lines returns the last n lines, or fewer.
func (b *Buffer) Lines(n int) []string {
	text := strings.TrimRight(b.String(), "\n")
	if text == "" {
		return nil
	}
	lines := strings.Split(text, "\n")
	return lines[max(0, len(lines)-n):]
}

// Reset empties the buffer.
func (b *Buffer) Reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = b.buf[:0]
}

// Contains reports whether the kept text contains text.
func (b *Buffer) Contains(text string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Contains(b.buf, []byte(text))
}
