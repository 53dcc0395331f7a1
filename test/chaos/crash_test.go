package chaos_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/failpoint"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

// killed is the exit code of a killed program.
const killed = 128 + int(syscall.SIGKILL)

// situation is a state of the system in which a relay takes particular steps.
type situation struct {
	name string
	// arrange creates the situation. It returns the number of published events, and
	// the number of these events that must become dead letters.
	arrange func(ctx context.Context, s *system.System) (events, dead int)
	// heal removes the obstacle to delivery.
	heal   func(ctx context.Context, s *system.System)
	points []failpoint.Point
	// visits selects the visits of a point at which the relay is killed: 1 is the
	// first visit, which is the default.
	visits []int
	// env is the environment of the later relays.
	env []string
}

const perBatch = 100

// small makes a relay cut batches of 100 events as soon as events are waiting.
var small = []string{
	fmt.Sprint("DIEHARD_RELAY_BATCH_MAX_ROWS=", perBatch), "DIEHARD_RELAY_LINGER=1ms", "DIEHARD_RELAY_POLL_INTERVAL=100ms",
}

var situations = []situation{
	{
		name: "delivering",
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			Expect(s.Publish(ctx, system.Events(10*perBatch)...)).To(Succeed())
			return 10 * perBatch, 0
		},
		points: []failpoint.Point{
			failpoint.CutLocked, failpoint.CutWritten, failpoint.CutBeforeCommit, failpoint.CutCommitted,
			failpoint.ClaimBefore, failpoint.ClaimMarked, failpoint.ClaimLeased,
			failpoint.FlushRead, failpoint.FlushBegun, failpoint.FlushAcknowledged,
			failpoint.SettleDeleted, failpoint.SettleBeforeCommit, failpoint.SettleCommitted,
		},
		visits: []int{1, 2},
	},
	{
		name: "finding late commits",
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
			s.Postgres.MustExecContext(ctx, "UPDATE outbox_cursor SET low_watermark = 1000, next_low_watermark = 1000, high_watermark = 1000")
			return perBatch, 0
		},
		points: []failpoint.Point{failpoint.WatermarkBeforeCommit},
	},
	{
		name: "after a failover that lost the cut of delivered events",
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
			die(s, failpoint.FlushAcknowledged)
			s.Postgres.MustExecContext(ctx, "DELETE FROM outbox_batches")
			s.Postgres.MustExecContext(ctx, "UPDATE outbox_cursor SET low_watermark = 0, next_low_watermark = 0, high_watermark = 0")
			s.Postgres.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
			return perBatch, 0
		},
		points: []failpoint.Point{failpoint.HistoryBeforeCommit, failpoint.HistoryCommitted},
		env:    []string{"DIEHARD_RELAY_FLUSH_TIMEOUT=1s"}, // limits the wait for inserts that may still run
	},
	{
		name:    "resolving a batch that is absent",
		arrange: unsent,
		points: []failpoint.Point{
			failpoint.ResolveRead, failpoint.ResolveWaited, failpoint.ResolveChecked,
			failpoint.FlushRead, failpoint.FlushBegun, failpoint.FlushAcknowledged,
			failpoint.ReinsertAcknowledged, failpoint.ReinsertWaited, failpoint.ReinsertChecked,
			failpoint.SettleDeleted, failpoint.SettleBeforeCommit, failpoint.SettleCommitted,
		},
	},
	{
		name: "resolving a batch that is present",
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
			die(s, failpoint.FlushAcknowledged)
			return perBatch, 0
		},
		points: []failpoint.Point{
			failpoint.ResolveRead, failpoint.ResolveWaited, failpoint.ResolveChecked,
			failpoint.SettleDeleted, failpoint.SettleBeforeCommit, failpoint.SettleCommitted,
		},
	},
	{
		name: "resolving a batch that is partly present",
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			n, _ := unsent(ctx, s)
			insertUnderToken(ctx, s, 7)
			return n, 0
		},
		points: []failpoint.Point{
			failpoint.ResolveChecked, failpoint.ShrinkDeleted, failpoint.ShrinkBeforeCommit, failpoint.ShrinkCommitted,
			failpoint.ReinsertAcknowledged, failpoint.SettleCommitted,
		},
	},
	{
		name: "renewing the token of a batch",
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			n, _ := unsent(ctx, s)
			loseRows(ctx, s)
			return n, 0
		},
		points: []failpoint.Point{
			failpoint.ReinsertAcknowledged, failpoint.ReinsertWaited, failpoint.ReinsertChecked,
			failpoint.RenewTokenBeforeCommit, failpoint.RenewTokenCommitted,
		},
	},
	{
		name: "with inserts that fail after their rows are stored",
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP,
				"CREATE MATERIALIZED VIEW throws ENGINE = Null AS SELECT throwIf(true) FROM event_log")
			Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
			return perBatch, 0
		},
		heal: func(ctx context.Context, s *system.System) {
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "DROP VIEW throws")
		},
		points: []failpoint.Point{failpoint.RetryBeforeCommit, failpoint.RetryCommitted},
	},
	{
		name: "with an event that ClickHouse refuses",
		env:  []string{"DIEHARD_RELAY_DEAD_LETTER_ATTEMPTS=2", "DIEHARD_RELAY_DEAD_LETTER_AFTER=10ms"},
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP,
				"ALTER TABLE event_log ADD CONSTRAINT no_poison CHECK event_type != 'poison'")
			published := system.Events(perBatch)
			published[perBatch/2].EventType = "poison"
			Expect(s.Publish(ctx, published...)).To(Succeed())
			return perBatch, 1
		},
		points: []failpoint.Point{
			failpoint.ResolveRead, failpoint.ResolveWaited, failpoint.ResolveChecked,
			failpoint.ShrinkDeleted, failpoint.ShrinkBeforeCommit, failpoint.ShrinkCommitted,
		},
		visits: []int{1, 2},
	},
	{
		name: "with an event that makes inserts fail",
		env:  []string{"DIEHARD_RELAY_DEAD_LETTER_ATTEMPTS=2", "DIEHARD_RELAY_DEAD_LETTER_AFTER=10ms"},
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP,
				"ALTER TABLE event_log ADD COLUMN amount UInt64 DEFAULT toUInt64(event_type = 'poison' ? '' : '1')")
			published := system.Events(perBatch)
			published[perBatch/2].EventType = "poison"
			Expect(s.Publish(ctx, published...)).To(Succeed())
			return perBatch, 1
		},
		points: []failpoint.Point{
			failpoint.SampleEnded, failpoint.SampleWaited, failpoint.SampleChecked,
			failpoint.ShrinkDeleted, failpoint.ShrinkBeforeCommit, failpoint.ShrinkCommitted,
		},
		visits: []int{1, 2},
	},
	{
		name: "with an event type in quarantine",
		env:  []string{"DIEHARD_RELAY_BACKOFF_MIN=10ms", "DIEHARD_RELAY_BACKOFF_MAX=100ms"},
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			s.Postgres.MustExecContext(ctx, "INSERT INTO outbox_quarantine (event_type, error) VALUES ('broken', 'a view throws')")
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP,
				"ALTER TABLE event_log ADD COLUMN amount UInt64 DEFAULT toUInt64(event_type = 'broken' ? '' : '1')")
			published := system.Events(perBatch)
			for i := range perBatch / 2 {
				published[2*i].EventType = "broken"
			}
			Expect(s.Publish(ctx, published...)).To(Succeed())
			return perBatch, 0
		},
		heal: func(ctx context.Context, s *system.System) {
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log MODIFY COLUMN amount UInt64 DEFAULT 1")
		},
		points: []failpoint.Point{ // the events are set aside, and then their batch is held
			failpoint.ShrinkBeforeCommit, failpoint.ShrinkCommitted, failpoint.RetryBeforeCommit, failpoint.RetryCommitted,
		},
	},
	{
		name: "with an event that cannot be encoded",
		arrange: func(ctx context.Context, s *system.System) (int, int) {
			Expect(s.Publish(ctx, system.Events(perBatch-1)...)).To(Succeed())
			s.Postgres.MustExecContext(ctx, "ALTER TABLE outbox_events DROP CONSTRAINT IF EXISTS event_date_time_is_in_years_1_to_9999")
			s.Postgres.MustExecContext(ctx, `INSERT INTO outbox_events (event_type, event_context, event_date_time)
				VALUES ('from_the_future', '{}', '12000-01-01 00:00:00+00')`)
			return perBatch, 1
		},
		points: []failpoint.Point{failpoint.ShrinkDeleted, failpoint.ShrinkBeforeCommit, failpoint.ShrinkCommitted},
	},
}

var _ = Describe("A relay that is killed", func() {
	for _, in := range situations {
		Context(in.name, func() {
			for _, point := range in.points {
				for _, visit := range slices.Concat(in.visits, []int{1})[:max(1, len(in.visits))] {
					for _, protocol := range protocolsAt(point) {
						It(fmt.Sprintf("loses and doubles no event at %s, visit %d, over %s", point, visit, protocol), func(ctx SpecContext) {
							s := newSystem(ctx)
							events, dead := in.arrange(ctx, s)
							relay := s.LaunchRelay(s.ClickHouseDSN(protocol),
								slices.Concat(small, in.env, []string{fmt.Sprintf("FAILPOINT=%s=kill@%d", point, visit)})...)
							relay.EndsWith(killed)
							expectBacklog(ctx, s)
							if in.heal != nil {
								in.heal(ctx, s)
							}
							s.Relay(s.ClickHouseDSN(protocol), slices.Concat(small, in.env)...)
							expectOnce(ctx, s, outcome{
								Fault: "relay killed at each step", Done: in.name, Events: events, Dead: dead,
							})
						})
					}
				}
			}
		})
	}

	It("is killed at every existing step", func() {
		tried := []failpoint.Point{
			failpoint.KeyTaken, failpoint.PublishBefore, failpoint.PublishInserted, failpoint.KeyKept, failpoint.PublishCommitted,
			failpoint.RequeueBeforeCommit, failpoint.RequeueCommitted,
		}
		for _, in := range situations {
			tried = append(tried, in.points...)
		}
		for _, point := range failpoint.All {
			Expect(tried).To(ContainElement(point))
		}
	})
})

var _ = Describe("An API that is killed", func() {
	for point, created := range map[failpoint.Point]int{
		failpoint.PublishBefore: 0, failpoint.PublishInserted: 1, failpoint.PublishCommitted: 1, // one statement inserts and commits
	} {
		It(fmt.Sprintf("leaves a user with its event, or neither, at %s", point), func(ctx SpecContext) {
			s := newSystem(ctx)
			api := s.API(fmt.Sprintf("FAILPOINT=%s=kill@2", point))
			system.Create(ctx, api, system.NewUser{Email: "first@example.com"})
			_, err := system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: "second@example.com"})
			Expect(err).To(HaveOccurred(), "the API responded")
			api.EndsWith(killed)

			Expect(usersWithoutEvent(s)).To(BeZero())
			api = s.API()
			a, err := system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: "second@example.com"})
			Expect(err).NotTo(HaveOccurred())
			Expect(a.Status).To(Equal([]int{http.StatusCreated, http.StatusConflict}[created]))
			s.Relay(s.ClickHouse.Native)
			expectOnce(ctx, s, outcome{Fault: "API killed at each step", Done: "creating a user", Events: 2})
		})
	}
})

// replays says for each failpoint of a request with a key whether the repetition gets a
// stored response.
type replays map[failpoint.Point]bool

var (
	// inTransaction is for requests that write in several statements.
	inTransaction = replays{
		failpoint.KeyTaken: false, failpoint.PublishBefore: false, failpoint.PublishInserted: false, failpoint.KeyKept: false,
		failpoint.PublishCommitted: true,
	}
	// inOneStatement is for requests in a group: one statement inserts and commits.
	inOneStatement = replays{failpoint.PublishBefore: false, failpoint.PublishInserted: true, failpoint.PublishCommitted: true}
)

var _ = Describe("An API that is killed in a request with an idempotency key", func() {
	// Users that exist before the request.
	const ada, bob = "019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c11", "019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c12"
	for _, change := range []struct {
		method, path, body string
		replays            replays
		status             int
		emails             []string // of the users after the request
		events             int
	}{
		{"POST", "/v1/users", `{"email":"eve@example.com"}`, inOneStatement, http.StatusCreated, []string{"ada", "bob", "eve"}, 1},
		{
			"POST", "/v1/users/batch", `{"data":[{"email":"eve@example.com"},{"email":"zoe@example.com"},{"email":"?"}]}`, inTransaction,
			http.StatusOK,
			[]string{"ada", "bob", "eve", "zoe"},
			2,
		},
		{
			"POST", "/v1/users/batch?atomic=true", `{"data":[{"email":"eve@example.com"},{"email":"zoe@example.com"}]}`, inTransaction,
			http.StatusOK,
			[]string{"ada", "bob", "eve", "zoe"},
			2,
		},
		{"PATCH", "/v1/users/" + ada, `{"email":"eve@example.com"}`, inTransaction, http.StatusOK, []string{"bob", "eve"}, 1},
		{"DELETE", "/v1/users/" + ada, ``, inTransaction, http.StatusNoContent, []string{"bob"}, 1},
		{
			"PATCH", "/v1/users/batch", `{"data":[{"id":"` + ada + `","email":"eve@example.com"},{"id":"` + bob + `","email":"zoe@example.com"},{}]}`,
			inTransaction, http.StatusOK,
			[]string{"eve", "zoe"},
			2,
		},
		{"POST", "/v1/users/batch/delete", `{"data":[{"id":"` + ada + `"},{"id":"` + bob + `"},{}]}`, inTransaction, http.StatusOK, []string{}, 2},
		{"POST", "/v1/events", `{"event_type":"a","event_context":1}`, inTransaction, http.StatusAccepted, []string{"ada", "bob"}, 1},
		{
			"POST", "/v1/events/batch", `{"data":[{"event_type":"a","event_context":1},{"event_type":"b","event_context":2},{}]}`, inTransaction,
			http.StatusOK,
			[]string{"ada", "bob"},
			2,
		},
	} {
		for point, replayed := range change.replays {
			It(fmt.Sprintf("commits the change with its key, or neither, at %s of %s %s", point, change.method, change.path), func(ctx SpecContext) {
				s := newSystem(ctx)
				ask := func(api *programs.Process) (system.Response, error) {
					var body any
					if change.body != "" {
						body = json.RawMessage(change.body)
					}
					return system.Send(ctx, change.method, api.URL()+change.path, body, "Idempotency-Key: k")
				}
				api := s.API(fmt.Sprintf("FAILPOINT=%s=kill", point))
				s.Postgres.MustExecContext(ctx, `INSERT INTO users (id, email, created_at, updated_at) VALUES
					($1, 'ada@example.com', now(), now()), ($2, 'bob@example.com', now(), now())`, ada, bob)
				_, err := ask(api)
				Expect(err).To(HaveOccurred(), "the API responded")
				api.EndsWith(killed)

				api = s.API()
				var response system.Response
				Eventually(ctx, func() (int, error) { // until PostgreSQL has ended the session
					response, err = ask(api)
					return response.Status, err
				}).WithTimeout(patience).Should(Equal(change.status))
				Expect(response.Headers.Get("Idempotency-Replayed")).To(Equal(map[bool]string{true: "true"}[replayed]))
				repeated, err := ask(api)
				Expect(err).NotTo(HaveOccurred())
				Expect(repeated.Status).To(Equal(change.status))
				Expect(repeated.Headers.Get("Idempotency-Replayed")).To(Equal("true"))
				Expect(repeated.Headers["Etag"]).To(Equal(response.Headers["Etag"]))
				Expect(repeated.Body).To(Equal(response.Body))

				emails := []string{}
				Expect(s.Postgres.SelectContext(ctx, &emails, "SELECT split_part(email, '@', 1) FROM users ORDER BY email")).To(Succeed())
				Expect(emails).To(Equal(change.emails))
				var keys int
				Expect(s.Postgres.GetContext(ctx, &keys, "SELECT count(*) FROM idempotency_keys")).To(Succeed())
				Expect(keys).To(Equal(1))
				s.Relay(s.ClickHouse.Native, "DIEHARD_RELAY_FLUSH_TIMEOUT=1s") // limits the wait for earlier inserts
				expectOnce(ctx, s, outcome{Fault: "API killed at each step", Done: "changes with a key", Events: change.events})
			})
		}
	}
})

var _ = Describe("An API that is killed while it publishes events whose ids the client has chosen", func() {
	const a, b = `{"event_id":"019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c11","event_type":"a","event_context":1}`,
		`{"event_id":"019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c12","event_type":"b","event_context":2}`
	for _, point := range []failpoint.Point{failpoint.PublishBefore, failpoint.PublishInserted, failpoint.PublishCommitted} {
		for _, change := range []struct {
			path, body string
			status     int
			events     int
		}{
			{"/v1/events", a, http.StatusAccepted, 1},
			{"/v1/events/batch", `{"data":[` + a + `,` + b + `]}`, http.StatusOK, 2},
		} {
			It(fmt.Sprintf("publishes each event once, although the request is repeated, at %s of POST %s", point, change.path), func(ctx SpecContext) {
				s := newSystem(ctx)
				ask := func(api *programs.Process) (system.Response, error) {
					return system.Post(ctx, api.URL()+change.path, json.RawMessage(change.body))
				}
				api := s.API(fmt.Sprintf("FAILPOINT=%s=kill", point))
				_, err := ask(api)
				Expect(err).To(HaveOccurred(), "the API responded")
				api.EndsWith(killed)

				api = s.API()
				for range 2 {
					Eventually(ctx, func() (int, error) { // until PostgreSQL has ended the session
						response, err := ask(api)
						return response.Status, err
					}).WithTimeout(patience).Should(Equal(change.status))
				}
				s.Relay(s.ClickHouse.Native)
				expectOnce(ctx, s, outcome{Fault: "API killed at each step", Done: "events with ids of the client", Events: change.events})
			})
		}
	}
})

var _ = Describe("An API that is killed under load, 10 times", Label("long"), func() {
	It("keeps each acknowledged user, and one event for each user", func(ctx SpecContext) {
		s := newSystem(ctx)
		s.Relay(s.ClickHouse.Native, small...)
		api := s.API()
		users := createUsers(ctx, api, 500)
		for range 10 {
			users.awaitMore(ctx, perBatch/5)
			api.Kill()
			users.awaitFailure(ctx)
			api = s.API()
			users.url.Store(api.URL())
		}
		users.awaitMore(ctx, perBatch)
		users.expectEach(ctx, s, outcome{Fault: "API killed under load, 10 times", Done: "creating users"})
	})

	It("returns the same user when a request is repeated with its key", func(ctx SpecContext) {
		s := newSystem(ctx)
		s.Relay(s.ClickHouse.Native, small...)
		api := s.API()
		users := createUsersOnce(ctx, api, 500)
		for range 10 {
			users.awaitMore(ctx, perBatch/5)
			api.Kill()
			users.awaitFailure(ctx)
			api = s.API()
			users.url.Store(api.URL())
		}
		users.awaitMore(ctx, perBatch)
		users.expectEach(ctx, s, outcome{Fault: "API killed under load, 10 times", Done: "creating users, with keys"})
	})
})

var _ = Describe("A retry of dead letters that is killed", func() {
	for point, code := range map[failpoint.Point]int{failpoint.RequeueBeforeCommit: 0, failpoint.RequeueCommitted: 1} {
		It(fmt.Sprintf("loses and doubles no event at %s, and can be repeated", point), func(ctx SpecContext) {
			s := newSystem(ctx)
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP,
				"ALTER TABLE event_log ADD CONSTRAINT no_poison CHECK event_type != 'poison'")
			Expect(s.Publish(ctx, system.Event(), system.Event(outbox.WithType("poison")))).To(Succeed())
			s.Relay(s.ClickHouse.Native, small...)
			s.AwaitEmpty(ctx)
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log DROP CONSTRAINT no_poison")

			retry := func(env ...string) *programs.Process {
				return programs.Run(suite.Prepared(), "relay", []string{"dead-letters", "retry", "1", "--yes"}, append(env,
					"DIEHARD_POSTGRES_DSN="+s.PostgresDSN, "DIEHARD_CLICKHOUSE_DSN="+s.ClickHouse.Native)...)
			}
			retry(fmt.Sprintf("FAILPOINT=%s=kill", point)).EndsWith(killed)
			retry().EndsWith(code)
			expectOnce(ctx, s, outcome{Fault: "operator's command killed", Done: fmt.Sprintf("retrying a dead letter, at %s", point), Events: 2})
		})
	}
})

// usersWithoutEvent counts the users that do not have exactly one event in the
// outbox.
func usersWithoutEvent(s *system.System) (users int) {
	GinkgoHelper()
	Expect(s.Postgres.Get(&users, `SELECT count(*) FROM users WHERE 1 != (
		SELECT count(*) FROM outbox_events WHERE event_context->>'user_id' = users.id::text)`)).To(Succeed())
	return users
}

// protocolsAt returns the protocols to test a step with. Most steps are the same in
// both protocols.
func protocolsAt(point failpoint.Point) []string {
	switch point {
	case failpoint.FlushBegun, failpoint.FlushAcknowledged, failpoint.ReinsertAcknowledged:
		return []string{"native", "http"}
	default:
		return []string{"native"}
	}
}

// unsent leaves a batch with a recorded attempt that has not inserted anything.
func unsent(ctx context.Context, s *system.System) (events, dead int) {
	Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
	die(s, failpoint.FlushRead)
	return perBatch, 0
}

// die runs a relay until it is killed at the point.
func die(s *system.System, point failpoint.Point) {
	GinkgoHelper()
	s.LaunchRelay(s.ClickHouse.Native, slices.Concat(small, []string{fmt.Sprintf("FAILPOINT=%s=kill", point)})...).EndsWith(killed)
}

// insertUnderToken inserts the first n events of the only batch under its token.
func insertUnderToken(ctx context.Context, s *system.System, n int) {
	GinkgoHelper()
	var token string
	Expect(s.Postgres.Get(&token, "SELECT token FROM outbox_batches")).To(Succeed())
	rows, err := s.Postgres.QueryContext(ctx, `SELECT format($$('%s', '%s', '%s', '%s', '%s', %s)$$, event_id, event_type,
		to_char(event_date_time AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US'), environment, event_context, metadata_version)
		FROM outbox_events ORDER BY id LIMIT $1`, n)
	Expect(err).NotTo(HaveOccurred())
	defer rows.Close()
	statement := "INSERT INTO event_log SETTINGS insert_deduplication_token = '" + token + "', async_insert = 0 VALUES "
	for rows.Next() {
		var values string
		Expect(rows.Scan(&values)).To(Succeed())
		statement += values + " "
	}
	Expect(rows.Err()).NotTo(HaveOccurred())
	testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, statement)
}

// loseRows inserts an event of the only batch under the batch's token, and deletes the
// row. Then ClickHouse remembers the token, but has no event of the batch.
func loseRows(ctx context.Context, s *system.System) {
	GinkgoHelper()
	insertUnderToken(ctx, s, 1)
	for _, statement := range []string{
		"SYSTEM START MERGES event_log", // a deletion needs merges
		"ALTER TABLE event_log DELETE WHERE true SETTINGS mutations_sync = 1",
		"SYSTEM STOP MERGES event_log",
	} {
		testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, statement)
	}
}
