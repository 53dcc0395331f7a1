package outboxtest

import (
	"fmt"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// JSON returns the text as JSON, for an expected event in a test. It panics if the text
// is not valid.
func JSON(text string) outbox.JSON {
	parsed, err := outbox.ParseJSON([]byte(text))
	if err != nil {
		panic(fmt.Sprintf("outboxtest: %q %v", text, err))
	}
	return parsed
}

// Traceparent returns the text as a trace context. It panics if the text is not valid.
func Traceparent(text string) outbox.Traceparent {
	parsed, err := outbox.ParseTraceparent(text)
	if err != nil {
		panic(fmt.Sprintf("outboxtest: %q %v", text, err))
	}
	return parsed
}
