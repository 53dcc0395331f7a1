// Package demo demonstrates Diehard: it creates users over HTTP and waits for
// their events in ClickHouse.
package demo

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	_ "github.com/ClickHouse/clickhouse-go/v2" // the driver "clickhouse"
	_ "github.com/lib/pq"                      // the driver "postgres"
	"golang.org/x/sync/errgroup"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/stack"
)

const (
	// clients is the number of concurrent requests. The API's connection pool serves
	// this number of requests without a queue.
	clients = 16
	poll    = 100 * time.Millisecond
	// patience limits the time without progress before the demo gives up.
	patience = time.Minute
)

// Options configures a demo.
type Options struct {
	State  stack.State
	Users  int
	APIKey string // empty if the API requires none
	Out    io.Writer
}

type demo struct {
	o          Options
	prefix     string // of this run's e-mail addresses
	http       *http.Client
	postgres   *sql.DB
	clickHouse *sql.DB
	progress   *progress
}

// Run creates the users. It returns when ClickHouse has each of their events
// once and the outbox is empty. Any other outcome is an error.
func Run(ctx context.Context, o Options) error {
	d := &demo{
		o: o,
		// The data of earlier runs stay, and e-mail addresses are unique.
		prefix: "demo-" + strconv.FormatInt(time.Now().UnixMilli(), 36) + "-",
		http:   &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: clients}},
	}
	var err error
	if d.postgres, err = sql.Open("postgres", o.State.PostgresDSN); err != nil {
		return fmt.Errorf("open PostgreSQL: %w", err)
	}
	defer d.postgres.Close()
	if d.clickHouse, err = sql.Open("clickhouse", o.State.ClickHouseDSN); err != nil {
		return fmt.Errorf("open ClickHouse: %w", err)
	}
	defer d.clickHouse.Close()

	d.progress = newProgress(o.Out, o.Users)
	began := time.Now()
	var creating time.Duration
	group, working := errgroup.WithContext(ctx)
	group.Go(func() error {
		defer func() { creating = time.Since(began) }()
		return d.create(working)
	})
	group.Go(func() error { return d.watch(working) })
	err = group.Wait()
	d.progress.finish(err == nil)
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	if err != nil {
		return err //nolint:wrapcheck // the error names the operation
	}
	return d.report(ctx, creating, time.Since(began))
}

// create creates the users, and stops at the first error.
func (d *demo) create(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(clients)
	for n := range d.o.Users {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			if err := d.createOne(ctx, n); err != nil {
				return fmt.Errorf("create user %d: %w", n+1, err)
			}
			d.progress.created()
			return nil
		})
	}
	return group.Wait() //nolint:wrapcheck // the error names the operation
}

func (d *demo) createOne(ctx context.Context, n int) error {
	body, err := json.Marshal(map[string]string{
		"email":      fmt.Sprintf("%s%d@example.com", d.prefix, n+1),
		"first_name": firstNames[n%len(firstNames)],
		"last_name":  lastNames[n/len(firstNames)%len(lastNames)],
	})
	if err != nil {
		return err //nolint:wrapcheck // cannot happen with this type
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, d.o.State.APIURL+"/v1/users", bytes.NewReader(body))
	if err != nil {
		return err //nolint:wrapcheck // the error names the address
	}
	request.Header.Set("Content-Type", "application/json")
	if d.o.APIKey != "" {
		request.Header.Set("Authorization", "Bearer "+d.o.APIKey)
	}
	response, err := d.http.Do(request)
	if err != nil {
		return err //nolint:wrapcheck // the error names the address
	}
	defer response.Body.Close()
	const enough = 4 << 10
	answer, err := io.ReadAll(io.LimitReader(response.Body, enough))
	if err != nil {
		return err //nolint:wrapcheck // the error names the address
	}
	if response.StatusCode != http.StatusCreated {
		return fmt.Errorf("%s: %s", response.Status, bytes.TrimSpace(answer))
	}
	return nil
}

var (
	firstNames = []string{"Ada", "Grace", "Edsger", "Barbara", "Donald", "Frances", "Leslie", "Radia", "Tony", "Margaret"}
	lastNames  = []string{"Lovelace", "Hopper", "Dijkstra", "Liskov", "Knuth", "Allen", "Lamport", "Perlman", "Hoare", "Hamilton", "Turing"}
)

// watch returns when all events have arrived and the outbox is empty.
func (d *demo) watch(ctx context.Context) error {
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	var arrived, left int
	lastChange := time.Now()
	for {
		nowArrived, nowLeft, err := d.count(ctx)
		if err != nil {
			return err
		}
		if nowArrived != arrived || nowLeft != left {
			lastChange = time.Now()
		}
		arrived, left = nowArrived, nowLeft
		d.progress.arrived(arrived)
		if arrived >= d.o.Users && left == 0 {
			return nil
		}
		if time.Since(lastChange) > patience {
			return fmt.Errorf("no progress for %s: %d of %d events in ClickHouse, %d left in the outbox",
				patience, arrived, d.o.Users, left)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return context.Cause(ctx) //nolint:wrapcheck // the caller's own error
		}
	}
}

func (d *demo) count(ctx context.Context) (arrived, left int, err error) {
	if err := d.clickHouse.QueryRowContext(ctx, "SELECT count() "+d.ownEvents()).Scan(&arrived); err != nil {
		return 0, 0, fmt.Errorf("count the events in ClickHouse: %w", err)
	}
	if err := d.postgres.QueryRowContext(ctx, "SELECT count(*) FROM outbox_events").Scan(&left); err != nil {
		return 0, 0, fmt.Errorf("count the events in the outbox: %w", err)
	}
	return arrived, left, nil
}

// ownEvents returns the end of a query that selects the events of this run.
func (d *demo) ownEvents() string {
	return "FROM " + d.o.State.EventTable +
		" WHERE event_type = 'user_created' AND startsWith(JSONExtractString(event_context, 'email'), '" + d.prefix + "')"
}

func (d *demo) report(ctx context.Context, creating, delivering time.Duration) error {
	var rows, distinct int
	if err := d.clickHouse.QueryRowContext(ctx, "SELECT count(), uniqExact(event_id) "+d.ownEvents()).Scan(&rows, &distinct); err != nil {
		return fmt.Errorf("count the events in ClickHouse: %w", err)
	}
	_, left, err := d.count(ctx)
	if err != nil {
		return err
	}
	const sample = 5
	table, err := d.table(ctx, fmt.Sprintf("SELECT event_date_time, event_type, environment, event_context, metadata_version %s "+
		"ORDER BY event_date_time LIMIT %d FORMAT PrettyCompactMonoBlock SETTINGS output_format_pretty_color = 0", d.ownEvents(), sample))
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintf(d.o.Out, `
  %-20s %8d   in %.1f s, %.0f a second
  %-20s %8d   %.1f s after the first request; %d distinct
  %-20s %8d

The first events in ClickHouse:

%s`,
		"created", d.o.Users, creating.Seconds(), float64(d.o.Users)/creating.Seconds(),
		"in ClickHouse", rows, delivering.Seconds(), distinct,
		"left in the outbox", left, table)
	if rows != d.o.Users || distinct != d.o.Users {
		return fmt.Errorf("%d users were created, but ClickHouse has %d events (%d distinct)", d.o.Users, rows, distinct)
	}
	return nil
}

// table returns the result of a query in ClickHouse's table format.
func (d *demo) table(ctx context.Context, query string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, stack.ClickHouseURL(d.o.State.ClickHouseHTTPDSN), bytes.NewBufferString(query))
	if err != nil {
		return "", fmt.Errorf("read a sample: %w", err)
	}
	response, err := d.http.Do(request)
	if err != nil {
		return "", fmt.Errorf("read a sample: %w", err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		return "", fmt.Errorf("read a sample: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("read a sample: %s: %s", response.Status, answer)
	}
	return string(answer), nil
}
