package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// createScript creates a user and its event in one statement. This is the cheapest
// way in which PostgreSQL can do the work of the API. %[2]s is storeScript or empty.
const createScript = `\set n random(1, 1000000000000)
WITH created AS (
    INSERT INTO users (id, email, first_name, last_name, created_at, updated_at)
    VALUES (%[1]s, 'user-' || :n || '@example.com', 'Ada', 'Lovelace', now(), now())
    ON CONFLICT (lower(email)) DO NOTHING
    RETURNING id, email
)%[2]s
INSERT INTO outbox_events (event_id, event_type, event_date_time, environment, event_context, metadata_version)
SELECT %[1]s, 'user_created', now(), 'Local',
       ('{"user_id":"' || id || '","email":"' || email || '","first_name":"Ada","last_name":"Lovelace"}')::json, 1
FROM created;
`

// storeScript stores a response under an idempotency key.
const storeScript = `, stored AS (
    INSERT INTO idempotency_keys (client, key, fingerprint, status, location, etag, body, expires_at)
    SELECT '', 'key-' || :n , sha256('request'), 201, '/v1/users/' || id, '"1764403200000000"',
           convert_to('{"id":"' || id || '","email":"' || email || '","first_name":"Ada","last_name":"Lovelace",' ||
                      '"created_at":"2025-11-29T08:00:00Z","updated_at":"2025-11-29T08:00:00Z"}', 'UTF8'),
           now() + interval '1 day'
    FROM created
)`

const (
	createTime = 2 * time.Second
	// overloadTime is longer than a client waits after a request that was shed.
	overloadTime = 10 * time.Second
	// overloadClients is four times http.max_concurrent_requests.
	overloadClients = 400
	bestClients     = 100
)

// benchAPI compares the users that the API creates per second with pgbench
// transactions that write the same rows. Both rates exclude the CPU time of the
// clients themselves.
func benchAPI(ctx context.Context, b *bench) (err error) {
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
	for _, c := range []createCase{
		{name: "api_vs_pgbench_cte_c8", clients: 8},
		{name: "api_vs_pgbench_cte_c32", clients: 32},
		{name: "api_keyed_vs_pgbench_c32", clients: 32, keyed: true},
	} {
		if err := b.creates(ctx, d, api, c); err != nil {
			return err
		}
	}
	return b.overload(ctx, d, api)
}

// createCase compares requests of concurrent clients with pgbench.
type createCase struct {
	name    string // of the ratio
	clients int
	keyed   bool // the requests have idempotency keys
}

func (b *bench) creates(ctx context.Context, d *database, api *program, c createCase) error {
	script, err := d.writeScript(ctx, c.keyed)
	if err != nil {
		return err
	}
	defer os.Remove(script)
	reference, measure := "pgbench", d.pgbench
	if _, err := exec.LookPath("pgbench"); err != nil {
		reference, measure = "database/sql (pgbench is not installed)", d.prepared
	}
	of := fmt.Sprintf("%d clients", c.clients)
	if c.keyed {
		of += ", with keys"
	}
	requests := b.newSeries("POST /v1/users, "+of, "1/s")
	transactions := b.newSeries(reference+", one statement, "+of, "1/s")
	cpu := b.newSeries("the API's CPU for a request, "+of, "us")
	err = b.inRounds(ctx, d.emptied(func(ctx context.Context) error {
		before, err := cpuTime(api.cmd.Process.Pid)
		if err != nil {
			return err
		}
		rate, n, err := load(ctx, api.http, c.clients, b.during(createTime), c.keyed)
		if err != nil {
			return err
		}
		after, err := cpuTime(api.cmd.Process.Pid)
		if err != nil {
			return err
		}
		requests.add(rate)
		cpu.add(float64((after - before).Microseconds()) / float64(n))
		return nil
	}), d.emptied(func(ctx context.Context) error {
		rate, err := measure(ctx, script, c.clients, b.during(createTime))
		transactions.add(rate)
		return err
	}))
	if err != nil {
		return err
	}
	for _, s := range []*series{requests, transactions, cpu} {
		s.show(b.out)
	}
	b.compare(c.name, requests, transactions)
	return nil
}

// overload compares more clients than the API serves at a time with as many as it serves.
// The clients wait for Retry-After after a request that was shed.
func (b *bench) overload(ctx context.Context, d *database, api *program) error {
	best := b.newSeries(fmt.Sprintf("POST /v1/users, %d clients", bestClients), "1/s")
	overloaded := b.newSeries(fmt.Sprintf("POST /v1/users, %d clients", overloadClients), "1/s")
	measure := func(s *series, clients int) func(context.Context) error {
		return d.emptied(func(ctx context.Context) error {
			rate, _, err := load(ctx, api.http, clients, b.during(overloadTime), false)
			s.add(rate)
			return err
		})
	}
	if err := b.inRounds(ctx, measure(best, bestClients), measure(overloaded, overloadClients)); err != nil {
		return err
	}
	best.show(b.out)
	overloaded.show(b.out)
	b.compare("api_overload_c400", overloaded, best)
	return nil
}

// withoutClients returns n per second of the time that was left for the server. The
// clients' CPU time, divided by the number of CPUs, is subtracted from took.
func withoutClients(n int64, took, clients time.Duration) float64 {
	return float64(n) / (took - clients/time.Duration(runtime.NumCPU())).Seconds()
}

// ownTime returns the CPU time of this process.
func ownTime() time.Duration {
	var usage syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &usage) != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// users counts the users of a run, for unique e-mail addresses.
var users atomic.Int64

// load runs concurrent clients for a duration. Each client creates one user after the
// other, with an idempotency key if keyed is true.
func load(ctx context.Context, address string, clients int, d time.Duration, keyed bool) (rate float64, created int64, err error) {
	var n atomic.Int64
	start, cpu := time.Now(), ownTime()
	group, ctx := errgroup.WithContext(ctx)
	for range clients {
		group.Go(func() error {
			c, err := newClient(ctx, address)
			if err != nil {
				return err
			}
			defer c.Close()
			for time.Since(start) < d && ctx.Err() == nil {
				wait, err := c.createUser(keyed)
				if err != nil {
					return err
				}
				if wait == 0 {
					n.Add(1)
					continue
				}
				select {
				case <-ctx.Done():
				case <-time.After(min(wait, d-time.Since(start))):
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return 0, 0, err //nolint:wrapcheck // the error names the operation
	}
	return withoutClients(n.Load(), time.Since(start), ownTime()-cpu), n.Load(), nil
}

// client is an HTTP client that uses little CPU time, because it shares the
// CPUs with the API.
type client struct {
	net.Conn

	address   string
	responses *bufio.Reader
	request   bytes.Buffer
	body      []byte
}

func newClient(ctx context.Context, address string) (*client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("connect to the API: %w", err)
	}
	return &client{Conn: conn, address: address, responses: bufio.NewReader(conn)}, nil
}

// createUser creates a user. If the request was shed, it returns the time after which the
// client may repeat it.
func (c *client) createUser(keyed bool) (retryAfter time.Duration, err error) {
	n := users.Add(1)
	c.body = append(c.body[:0], `{"email":"user-`...)
	c.body = strconv.AppendInt(c.body, n, 10)
	c.body = append(c.body, `@example.com","first_name":"Ada","last_name":"Lovelace"}`...)
	header := ""
	if keyed {
		header = "Idempotency-Key: key-" + strconv.FormatInt(n, 10) + "\r\n"
	}
	return c.post("/v1/users", header, c.body, "201")
}

// post sends a body and expects a status. header is empty, or consists of lines. If the
// request was shed, post returns the time after which the client may repeat it.
func (c *client) post(path, header string, body []byte, expected string) (retryAfter time.Duration, err error) {
	c.request.Reset()
	fmt.Fprintf(&c.request, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n",
		path, c.address, len(body), header)
	c.request.Write(body)
	if _, err := c.Write(c.request.Bytes()); err != nil {
		return 0, fmt.Errorf("send a request: %w", err)
	}
	status, err := c.responses.ReadSlice('\n')
	if err != nil {
		return 0, fmt.Errorf("read a response: %w", err)
	}
	const code, codeEnd = len("HTTP/1.1 "), len("HTTP/1.1 201")
	asExpected := len(status) > codeEnd && string(status[code:codeEnd]) == expected
	response := ""
	if !asExpected {
		response = string(bytes.TrimSpace(status))
	}
	length := 0
	for {
		line, err := c.responses.ReadSlice('\n')
		if err != nil {
			return 0, fmt.Errorf("read a response: %w", err)
		}
		if len(line) == len("\r\n") {
			break
		}
		if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			if length, err = strconv.Atoi(string(bytes.TrimSpace(value))); err != nil {
				return 0, fmt.Errorf("read a response: %w", err)
			}
		}
		if value, ok := bytes.CutPrefix(line, []byte("Retry-After: ")); ok {
			seconds, err := strconv.Atoi(string(bytes.TrimSpace(value)))
			if err != nil {
				return 0, fmt.Errorf("read a response: %w", err)
			}
			retryAfter = time.Duration(seconds) * time.Second
		}
	}
	if asExpected {
		_, err = c.responses.Discard(length)
		return 0, err //nolint:wrapcheck // the error names the operation
	}
	rest, err := io.ReadAll(io.LimitReader(c.responses, int64(length)))
	if err == nil && retryAfter > 0 && bytes.Contains(rest, []byte("#overloaded")) {
		return retryAfter, nil
	}
	return 0, fmt.Errorf("the API responded with %s: %s", response, rest)
}

// writeScript writes pgbench's script to a file and returns its path.
func (d *database) writeScript(ctx context.Context, keyed bool) (string, error) {
	id := "gen_random_uuid()"
	var hasV7 bool
	if err := d.GetContext(ctx, &hasV7, "SELECT current_setting('server_version_num')::int >= 180000"); err != nil {
		return "", fmt.Errorf("read the version: %w", err)
	}
	if hasV7 {
		id = "uuidv7()"
	}
	file, err := os.CreateTemp("", "diehard-bench-*.sql")
	if err != nil {
		return "", fmt.Errorf("write the script: %w", err)
	}
	store := ""
	if keyed {
		store = storeScript
	}
	_, err = fmt.Fprintf(file, createScript, id, store)
	return file.Name(), errors.Join(err, file.Close())
}

var (
	processed = regexp.MustCompile(`number of transactions actually processed: (\d+)`)
	failed    = regexp.MustCompile(`number of failed transactions: (\d+)`)
	perSecond = regexp.MustCompile(`tps = ([0-9.]+) \(without`)
)

func (d *database) pgbench(ctx context.Context, script string, clients int, during time.Duration) (float64, error) {
	threads := min(clients, runtime.NumCPU())
	cmd := exec.CommandContext(ctx, "pgbench", "--no-vacuum", "--protocol=prepared", //nolint:gosec // our own numbers and file
		"--client="+strconv.Itoa(clients), "--jobs="+strconv.Itoa(threads),
		"--time="+strconv.Itoa(max(1, int(during.Seconds()))), "--file="+script, d.dsn)
	cmd.Env = append(os.Environ(), "HOME="+filepath.Dir(script))
	output, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("pgbench: %w\n%s", err, output)
	}
	count, rate := processed.FindSubmatch(output), perSecond.FindSubmatch(output)
	if count == nil || rate == nil {
		return 0, fmt.Errorf("unexpected output of pgbench:\n%s", output)
	}
	if bad := failed.FindSubmatch(output); len(bad) > 1 && string(bad[1]) != "0" {
		return 0, fmt.Errorf("%s transactions of pgbench failed", bad[1])
	}
	n, err := strconv.ParseInt(string(count[1]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("unexpected output of pgbench:\n%s", output)
	}
	tps, err := strconv.ParseFloat(string(rate[1]), 64)
	if err != nil {
		return 0, fmt.Errorf("unexpected output of pgbench:\n%s", output)
	}
	took := time.Duration(float64(n) / tps * float64(time.Second)) // excludes the start of pgbench
	return withoutClients(n, took, cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()), nil
}

// prepared runs pgbench's transaction with the prepared statements of Go's driver.
func (d *database) prepared(ctx context.Context, script string, clients int, during time.Duration) (float64, error) {
	text, err := os.ReadFile(script)
	if err != nil {
		return 0, fmt.Errorf("read the script: %w", err)
	}
	_, statement, _ := bytes.Cut(text, []byte("\n"))
	statement = bytes.ReplaceAll(statement, []byte(":n "), []byte("$1::text "))
	var n atomic.Int64
	start, cpu := time.Now(), ownTime()
	group, ctx := errgroup.WithContext(ctx)
	for range clients {
		group.Go(func() error {
			conn, err := d.Connx(ctx)
			if err != nil {
				return fmt.Errorf("connect: %w", err)
			}
			defer conn.Close()
			prepared, err := conn.PreparexContext(ctx, string(statement)) //nolint:sqlclosecheck // closed below
			if err != nil {
				return fmt.Errorf("prepare: %w", err)
			}
			defer prepared.Close()
			for time.Since(start) < during && ctx.Err() == nil {
				if _, err := prepared.ExecContext(ctx, strconv.FormatInt(users.Add(1), 10)); err != nil {
					return fmt.Errorf("execute: %w", err)
				}
				n.Add(1)
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return 0, err //nolint:wrapcheck // the error names the operation
	}
	return withoutClients(n.Load(), time.Since(start), ownTime()-cpu), nil
}
