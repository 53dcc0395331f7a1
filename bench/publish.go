package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jmoiron/sqlx"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

const insertEvent = `INSERT INTO outbox_events
	(event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent)
VALUES ($1, $2, $3, $4, $5, $6, $7)`

// userCreated is a typical event's context.
type userCreated struct {
	UserID    string `json:"user_id"`
	Email     string `json:"email"`
	FirstName string `json:"first_name"`
	LastName  string `json:"last_name"`
}

func newEvent(n int) (outbox.Event, error) {
	return outbox.NewEvent(userCreated{
		UserID: "0190c2f0-7f3a-7cc1-b0a8-2b7a3f2f6c11", Email: "user-" + strconv.Itoa(n) + "@example.com",
		FirstName: "Ada", LastName: "Lovelace",
	}, outbox.WithType("user_created"))
}

// benchPublish compares two kinds of transactions on one connection. It switches
// between them after every few hundred transactions.
func benchPublish(ctx context.Context, b *bench) (err error) {
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	publisher := outbox.NewPublisher(outbox.PublisherOptions{})
	transactions := b.scaled(300, 10)
	// transaction returns the time of a transaction whose only work is write.
	transaction := func(write func(tx *sqlx.Tx, event outbox.Event) error) (time.Duration, error) {
		var spent time.Duration
		for n := range transactions {
			start := time.Now()
			event, err := newEvent(n)
			if err != nil {
				return 0, err
			}
			tx, err := d.BeginTxx(ctx, nil)
			if err != nil {
				return 0, fmt.Errorf("begin: %w", err)
			}
			if err := write(tx, event); err != nil {
				return 0, errors.Join(err, tx.Rollback())
			}
			if err := tx.Commit(); err != nil {
				return 0, fmt.Errorf("commit: %w", err)
			}
			spent += time.Since(start)
		}
		return spent / time.Duration(transactions), nil
	}
	published, inserted := b.newSeries("a transaction with one Publish", "us"), b.newSeries("a transaction with the bare INSERT", "us")
	const turns = 8 // per round, because both are short
	for range turns {
		err = b.inRounds(ctx, func(ctx context.Context) error {
			spent, err := transaction(func(tx *sqlx.Tx, event outbox.Event) error { return publisher.Publish(ctx, tx, event) })
			published.add(float64(spent.Nanoseconds()) / 1e3)
			return err
		}, func(ctx context.Context) error {
			spent, err := transaction(func(tx *sqlx.Tx, event outbox.Event) error {
				_, err := tx.ExecContext(ctx, insertEvent, event.EventID, event.EventType, event.EventDateTime, "Local",
					event.EventContext.String(), event.MetadataVersion, nil)
				return err //nolint:wrapcheck // the driver's own error
			})
			inserted.add(float64(spent.Nanoseconds()) / 1e3)
			return err
		})
		if err != nil {
			return err
		}
	}
	published.show(b.out)
	inserted.show(b.out)
	b.compare("publish_overhead", published, inserted)
	return nil
}

const (
	batchUsers = 1000
	batches    = 10
)

// benchBatch compares a thousand users in one request with COPY of the same
// rows into both tables in one transaction.
func benchBatch(ctx context.Context, b *bench) (err error) {
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	api, err := d.startProgram(ctx, "api")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, api.stop()) }()
	c, err := newClient(ctx, api.http)
	if err != nil {
		return err
	}
	defer c.Close()
	requested, copied := b.newSeries("POST /v1/users/batch of 1,000", "users/s"), b.newSeries("COPY of the same rows", "users/s")
	n := b.scaled(batches, 1)
	err = b.inRounds(ctx, d.emptied(func(context.Context) error {
		start := time.Now()
		for range n {
			if _, err := c.post("/v1/users/batch", "", usersBody(batchUsers), "200"); err != nil {
				return err
			}
		}
		requested.add(float64(n*batchUsers) / time.Since(start).Seconds())
		return nil
	}), d.emptied(func(ctx context.Context) error {
		start := time.Now()
		for range n {
			if err := d.copyUsers(ctx, batchUsers); err != nil {
				return err
			}
		}
		copied.add(float64(n*batchUsers) / time.Since(start).Seconds())
		return nil
	}))
	if err != nil {
		return err
	}
	requested.show(b.out)
	copied.show(b.out)
	b.compare("batch_vs_copy", requested, copied)
	return nil
}

func usersBody(n int) []byte {
	var body strings.Builder
	body.WriteString(`{"data":[`)
	for i := range n {
		if i > 0 {
			body.WriteByte(',')
		}
		fmt.Fprintf(&body, `{"email":"user-%d@example.com","first_name":"Ada","last_name":"Lovelace"}`, users.Add(1))
	}
	body.WriteString(`]}`)
	return []byte(body.String())
}

// copyUsers inserts users with their events by COPY.
func (d *database) copyUsers(ctx context.Context, n int) error {
	tx, err := d.BeginTxx(ctx, nil)
	if err != nil {
		return fmt.Errorf("copy users: %w", err)
	}
	defer func() { _ = tx.Rollback() }() // no effect after a commit
	now := time.Now()
	events := make([]outbox.Event, n)
	for i := range events {
		if events[i], err = newEvent(int(users.Add(1))); err != nil {
			return err
		}
	}
	err = copyRows(ctx, tx, "COPY users (id, email, first_name, last_name, created_at, updated_at) FROM STDIN", n,
		func(i int) []any {
			return []any{events[i].EventID, "copied-" + events[i].EventID.String() + "@example.com", "Ada", "Lovelace", now, now}
		})
	if err != nil {
		return err
	}
	err = copyRows(ctx, tx, `COPY outbox_events
		(event_id, event_type, event_date_time, environment, event_context, metadata_version) FROM STDIN`, n, func(i int) []any {
		return []any{events[i].EventID, events[i].EventType, events[i].EventDateTime, "Local", events[i].EventContext.String(), 1}
	})
	if err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("copy users: %w", err)
	}
	return nil
}

func copyRows(ctx context.Context, tx *sqlx.Tx, statement string, n int, row func(i int) []any) error {
	copying, err := tx.PreparexContext(ctx, statement) //nolint:sqlclosecheck // closed below
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	defer copying.Close()
	for i := range n {
		if _, err := copying.ExecContext(ctx, row(i)...); err != nil {
			return fmt.Errorf("copy: %w", err)
		}
	}
	if _, err := copying.ExecContext(ctx); err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	return nil
}
