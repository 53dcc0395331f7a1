package outbox_test

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
)

// complete fills in the fields that the spec does not set.
func complete(event outbox.Event) outbox.Event {
	if event.EventID == uuid.Nil {
		event.EventID = uuid.New()
	}
	if event.EventType == "" {
		event.EventType = "thing_happened"
	}
	if event.EventDateTime.IsZero() {
		event.EventDateTime = time.Date(2026, 3, 1, 12, 0, 0, 123_456_000, time.UTC)
	}
	if event.EventContext.Len() == 0 {
		event.EventContext = outboxtest.JSON(`{}`)
	}
	return event
}

func publish(ctx context.Context, db *sqlx.DB, publisher *outbox.Publisher, events ...outbox.Event) {
	GinkgoHelper()
	for i := range events {
		events[i] = complete(events[i])
	}
	tx := db.MustBegin()
	defer func() { _ = tx.Rollback() }()
	Expect(publisher.Publish(ctx, tx, events...)).To(Succeed())
	Expect(tx.Commit()).To(Succeed())
}
