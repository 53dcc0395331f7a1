package outbox

import (
	"context"
	"database/sql"
	"fmt"
	"testing"
)

// discard is a transaction that does not execute its statements. The benchmarks measure
// only the work before a statement.
type discard struct{}

func (discard) ExecContext(context.Context, string, ...any) (sql.Result, error) { return nil, nil } //nolint:nilnil // the publisher ignores the result

func (discard) Commit() error { return nil }

func benchEvents(b *testing.B, n int) []Event {
	b.Helper()
	events := make([]Event, n)
	for i := range events {
		event, err := NewEvent(map[string]string{
			"user_id": "0190c2f0-7f3a-7cc1-b0a8-2b7a3f2f6c11", "email": fmt.Sprintf("user-%d@example.com", i),
			"first_name": "Ada", "last_name": "Lovelace",
		}, WithType("user_created"))
		if err != nil {
			b.Fatal(err)
		}
		events[i] = event
	}
	return events
}

func BenchmarkNewEvent(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		benchEvents(b, 1)
	}
}

func BenchmarkPublish(b *testing.B) {
	publisher := NewPublisher(PublisherOptions{})
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			events := benchEvents(b, n)
			b.ReportAllocs()
			for b.Loop() {
				if err := publisher.Publish(b.Context(), discard{}, events...); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkValidate(b *testing.B) {
	publisher := NewPublisher(PublisherOptions{})
	event := benchEvents(b, 1)[0]
	b.ReportAllocs()
	for b.Loop() {
		if broken := publisher.Validate(event); len(broken) > 0 {
			b.Fatal(broken)
		}
	}
}
