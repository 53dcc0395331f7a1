package outboxtest

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// TestingT is *testing.T, or the equivalent of another test framework.
type TestingT interface {
	Helper()
	Fatalf(format string, args ...any)
}

// Want describes an event. A field that is zero is not compared.
type Want struct {
	EventType string
	// EventContext is compared as a JSON value: spaces and the order of keys do not
	// count. A string, a json.RawMessage and an [outbox.JSON] are JSON texts. Any other
	// value is encoded, like the payload of [outbox.NewEvent].
	EventContext any
	// MetadataVersion is not compared if it is 0, so version 0 cannot be required.
	MetadataVersion int64
	Environment     string
	Traceparent     outbox.Traceparent
	// EventDateTime is compared to the microsecond.
	EventDateTime time.Time
}

// RequirePublished returns the events that the transaction has published. It fails the
// test unless they are exactly the wanted events, in this order. The failure message
// shows the difference.
func RequirePublished[R Row](ctx context.Context, t TestingT, tx Tx[R], want ...Want) []outbox.Event {
	t.Helper()
	published, found, wanted, err := compared(ctx, tx, want)
	if err != nil {
		t.Fatalf("outboxtest: %v", err)
		return nil
	}
	fill(wanted, found)
	if difference := cmp.Diff(wanted, found); difference != "" {
		t.Fatalf("outboxtest: the transaction has not published the wanted events (-want +published):\n%s", difference)
		return nil
	}
	return published
}

// RequireNotPublished fails the test if the transaction has published an event that
// matches one of the descriptions. Without a description, it fails the test if the
// transaction has published any event. The failure message shows these events.
func RequireNotPublished[R Row](ctx context.Context, t TestingT, tx Tx[R], unwanted ...Want) {
	t.Helper()
	_, found, descriptions, err := compared(ctx, tx, unwanted)
	if err != nil {
		t.Fatalf("outboxtest: %v", err)
		return
	}
	if len(descriptions) > 0 {
		found = slices.DeleteFunc(found, func(e event) bool { return !slices.ContainsFunc(descriptions, e.fits) })
	}
	if difference := cmp.Diff([]event{}, found); difference != "" {
		t.Fatalf("outboxtest: the transaction has published unwanted events (+published):\n%s", difference)
	}
}

// compared returns the published events of the transaction, and the two sides of the
// comparison with want.
func compared[R Row](ctx context.Context, tx Tx[R], want []Want) (published []outbox.Event, found, wanted []event, err error) {
	wanted = make([]event, len(want))
	for i, w := range want {
		if wanted[i], err = w.event(); err != nil {
			return nil, nil, nil, fmt.Errorf("Want %d: %w", i, err)
		}
	}
	if published, err = Published(ctx, tx); err != nil {
		return nil, nil, nil, err
	}
	found = make([]event, len(published))
	for i, p := range published {
		found[i] = eventOf(p)
	}
	return published, found, wanted, nil
}
