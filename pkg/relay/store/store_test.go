package store_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
	"github.com/diehard-outbox/diehard/pkg/relay/store"
)

// anyBytes is the byte limit of claims in specs that do not test the limit.
const anyBytes = int64(1) << 40

// complete fills in the fields that a spec leaves empty.
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

func contexts(events *store.Events) []string {
	texts := make([]string, events.EventContext.Len())
	for i := range texts {
		texts[i] = string(events.EventContext.At(i))
	}
	return texts
}

func second[T any](_ T, err error) error { return err }

var _ = Describe("Store", func() {
	var (
		db        *sqlx.DB
		publisher *outbox.Publisher
		s         *store.Store
	)

	BeforeEach(func(ctx SpecContext) {
		db = newDatabase(ctx)
		publisher = outbox.NewPublisher(outbox.PublisherOptions{})
		s = store.New(db, store.Options{MaxRows: 10, MaxBytes: 10_000})
	})

	publishMany := func(ctx context.Context, n int) {
		GinkgoHelper()
		publish(ctx, db, publisher, make([]outbox.Event, n)...)
	}

	// batches returns the events of each batch, in the order of their ids.
	batches := func() [][]int64 {
		GinkgoHelper()
		var rows []string
		Expect(db.Select(&rows, `
			SELECT (SELECT string_agg(id::text, ',' ORDER BY id) FROM outbox_events WHERE event_ids @> id)
			FROM outbox_batches ORDER BY batch_id`)).To(Succeed())
		ids := make([][]int64, len(rows))
		for i, row := range rows {
			for text := range strings.SplitSeq(row, ",") {
				var id int64
				Expect(fmt.Sscan(text, &id)).To(Equal(1))
				ids[i] = append(ids[i], id)
			}
		}
		return ids
	}

	sizes := func() []int {
		GinkgoHelper()
		var counts []int
		Expect(db.Select(&counts, "SELECT event_count FROM outbox_batches ORDER BY batch_id")).To(Succeed())
		return counts
	}

	cut := func(ctx context.Context) store.Cut {
		GinkgoHelper()
		cut, err := s.Cut(ctx, 0)
		Expect(err).NotTo(HaveOccurred())
		return cut
	}

	claim := func(ctx context.Context) *store.Lease {
		GinkgoHelper()
		lease, err := s.Claim(ctx, anyBytes, true)
		Expect(err).NotTo(HaveOccurred())
		if lease != nil {
			DeferCleanup(lease.Release)
		}
		return lease
	}

	// due makes every batch due now.
	due := func() {
		GinkgoHelper()
		db.MustExec("UPDATE outbox_batches SET next_attempt_at = '-infinity' WHERE next_attempt_at > now()")
	}

	settleAll := func(ctx context.Context) {
		GinkgoHelper()
		for lease := claim(ctx); lease != nil; lease = claim(ctx) {
			Expect(lease.Settle(ctx)).To(Succeed())
		}
	}

	Describe("Cut", func() {
		It("puts waiting events into batches of at most MaxRows, in the order of their ids", func(ctx SpecContext) {
			publishMany(ctx, 25)
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 3, Events: 25}))
			Expect(sizes()).To(Equal([]int{10, 10, 5}))
			Expect(slices.Concat(batches()...)).To(HaveLen(25))
			Expect(slices.IsSorted(slices.Concat(batches()...))).To(BeTrue())
			settleAll(ctx)
			Expect(cut(ctx)).To(BeZero())
		})

		It("bounds a batch's bytes, and puts a larger event into its own batch", func(ctx SpecContext) {
			large := outbox.Event{EventContext: outboxtest.JSON(`"` + strings.Repeat("x", 20_000) + `"`)}
			half := outbox.Event{EventContext: outboxtest.JSON(`"` + strings.Repeat("x", 5_000) + `"`)}
			publish(ctx, db, publisher, outbox.Event{}, large, half, half, outbox.Event{})
			Expect(cut(ctx).Batches).To(Equal(4))
			Expect(sizes()).To(Equal([]int{1, 1, 1, 2}))
		})

		It("fills a batch from two reads of events", func(ctx SpecContext) {
			large := outbox.Event{EventContext: outboxtest.JSON(`"` + strings.Repeat("x", 9_500) + `"`)}
			publish(ctx, db, publisher, slices.Concat(make([]outbox.Event, 8), []outbox.Event{large}, make([]outbox.Event, 9))...)
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 3, Events: 18}))
			Expect(sizes()).To(Equal([]int{8, 3, 7}), "Cut reads 10 events at a time")
		})

		It("cuts a lone event at once, then waits for the linger, except for a full batch", func(ctx SpecContext) {
			publishMany(ctx, 1)
			Expect(s.Cut(ctx, time.Hour)).To(Equal(store.Cut{Batches: 1, Events: 1}))

			publishMany(ctx, 9)
			waiting, err := s.Cut(ctx, time.Hour)
			Expect(err).NotTo(HaveOccurred())
			Expect(waiting.Batches).To(BeZero())
			Expect(waiting.Wait).To(And(BeNumerically(">", 0), BeNumerically("<=", time.Hour)))

			publishMany(ctx, 3)
			Expect(s.Cut(ctx, time.Hour)).To(HaveField("Events", 10))
			settleAll(ctx)
			Expect(s.Cut(ctx, 0)).To(HaveField("Events", 2))
		})

		It("cuts full batches but no partial batch while a batch waits for its first attempt", func(ctx SpecContext) {
			publishMany(ctx, 1)
			Expect(cut(ctx).Batches).To(Equal(1))
			publishMany(ctx, 5)
			Expect(s.Cut(ctx, time.Nanosecond)).To(Equal(store.Cut{More: true, Wait: time.Nanosecond}))
			publishMany(ctx, 6)
			Expect(cut(ctx).Events).To(Equal(10))
			lease := claim(ctx)
			Expect(cut(ctx).Batches).To(BeZero(), "one batch still waits")
			Expect(claim(ctx)).NotTo(BeNil())
			Expect(cut(ctx).Events).To(Equal(1), "both batches are being delivered")
			Expect(lease.Settle(ctx)).To(Succeed())
		})

		It("treats a last cut in the future as a cut long ago", func(ctx SpecContext) {
			publishMany(ctx, 1)
			db.MustExec("UPDATE outbox_cursor SET last_cut_at = now() + interval '1 day'")
			Expect(s.Cut(ctx, time.Hour)).To(HaveField("Batches", 1))
		})

		It("does nothing while another process cuts", func(ctx SpecContext) {
			publishMany(ctx, 1)
			other := db.MustBegin()
			other.MustExec("SELECT FROM outbox_cursor FOR UPDATE")
			Expect(cut(ctx)).To(BeZero())
			Expect(other.Rollback()).To(Succeed())
			Expect(cut(ctx).Batches).To(Equal(1))
		})

		It("cuts nothing while enough batches wait", func(ctx SpecContext) {
			publishMany(ctx, 200)
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 4, Events: 40, More: true}))
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 4, Events: 40, More: true}))
			Expect(cut(ctx)).To(Equal(store.Cut{More: true}))
			Expect(claim(ctx).Settle(ctx)).To(Succeed())
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 1, Events: 10, More: true}))
		})

		It("cuts while hundreds of batches are failing, and stops at a bound", func(ctx SpecContext) {
			const bound = 4096
			s = store.New(db, store.Options{MaxRows: 1})
			publishMany(ctx, 1)
			Expect(cut(ctx).Batches).To(Equal(1))
			Expect(claim(ctx).Settle(ctx)).To(Succeed())
			publishMany(ctx, bound+8)
			failing := func(from, to int) {
				db.MustExec(`INSERT INTO outbox_batches (batch_id, event_ids, event_count, byte_count, token, attempts, failures)
					SELECT gen_random_uuid(), int8multirange(int8range(id, id + 1)), 1, 1, id::text, 1, 1
					FROM outbox_events WHERE id BETWEEN $1 AND $2`, from, to)
			}
			failing(2, 301)
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 4, Events: 4, More: true}))
			failing(306, bound+5)
			Expect(cut(ctx)).To(Equal(store.Cut{More: true}))
			db.MustExec("DELETE FROM outbox_batches WHERE event_ids @> 2::bigint")
			Expect(cut(ctx).Batches).To(Equal(1))
		})

		It("returns the time to wait before it cuts events that do not fill a batch", func(ctx SpecContext) {
			publishMany(ctx, 1)
			cut(ctx)
			publishMany(ctx, 13)
			Expect(s.Cut(ctx, time.Hour)).To(Equal(store.Cut{Batches: 1, Events: 10, Wait: time.Hour}))
		})

		It("puts every event into exactly one batch while producers and other cutters work", func(ctx SpecContext) {
			const producers, each = 4, 200
			var wg sync.WaitGroup
			for range producers {
				wg.Go(func() {
					defer GinkgoRecover()
					for range each {
						publishMany(ctx, 3)
					}
				})
			}
			produced := make(chan struct{})
			go func() { wg.Wait(); close(produced) }()
			seen := make(map[int64]int)
			var mu sync.Mutex
			var cutters sync.WaitGroup
			for range 3 {
				cutters.Go(func() {
					defer GinkgoRecover()
					s := store.New(db, store.Options{MaxRows: 50})
					for done := false; ; {
						_, err := s.Cut(ctx, 0)
						Expect(err).NotTo(HaveOccurred())
						lease, err := s.Claim(ctx, anyBytes, true)
						Expect(err).NotTo(HaveOccurred())
						if lease != nil {
							keys, err := lease.Keys(ctx)
							Expect(err).NotTo(HaveOccurred())
							Expect(lease.Settle(ctx)).To(Succeed())
							mu.Lock()
							for _, id := range keys.ID {
								seen[id]++
							}
							mu.Unlock()
							continue
						}
						if work, err := s.Poll(ctx); done && err == nil && !work {
							return
						}
						select {
						case <-produced:
							done = true
						default:
						}
					}
				})
			}
			cutters.Wait()
			Expect(seen).To(HaveLen(producers * each * 3))
			for id, times := range seen {
				Expect(times).To(Equal(1), "event %d", id)
			}
		}, NodeTimeout(2*time.Minute))

		It("finds an event that commits long after events with higher ids", func(ctx SpecContext) {
			late := db.MustBegin()
			Expect(publisher.Publish(ctx, late, complete(outbox.Event{}))).To(Succeed())
			// After two moves the low watermark is above the late event.
			for range 3 {
				publishMany(ctx, 1)
				Expect(cut(ctx).Events).To(Equal(1))
				db.MustExec("UPDATE outbox_cursor SET next_low_watermark_at = 'epoch'")
				settleAll(ctx)
			}
			Expect(late.Commit()).To(Succeed())

			Expect(cut(ctx)).To(BeZero(), "the low watermark hides it")
			Expect(s.Poll(ctx)).To(BeTrue())
			Expect(cut(ctx).Events).To(Equal(1))
		})

		It("cuts late commits with the rest of a backlog", func(ctx SpecContext) {
			late := db.MustBegin()
			Expect(publisher.Publish(ctx, late, complete(outbox.Event{}))).To(Succeed())
			publishMany(ctx, 65)
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 4, Events: 40, More: true}))
			settleAll(ctx)
			Expect(late.Commit()).To(Succeed())
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 3, Events: 26}))
		})

		// lateInBacklog leaves more than four full batches in the outbox, and a late
		// commit with a lower id.
		lateInBacklog := func(ctx SpecContext) {
			GinkgoHelper()
			late := db.MustBegin()
			Expect(publisher.Publish(ctx, late, complete(outbox.Event{}))).To(Succeed())
			publishMany(ctx, 85)
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 4, Events: 40, More: true}))
			Expect(late.Commit()).To(Succeed())
		}

		It("cuts a late commit first in a backlog if the poll has found it", func(ctx SpecContext) {
			lateInBacklog(ctx)
			db.MustExec("UPDATE outbox_cursor SET low_watermark = 10, next_low_watermark = 10")
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 4, Events: 40, More: true}))
			settleAll(ctx)
			publishMany(ctx, 40)
			Expect(s.Poll(ctx)).To(BeTrue())
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 4, Events: 40, More: true}))
			Expect(batches()[0][:2]).To(Equal([]int64{1, 82}))
		})

		It("continues a backlog at the end of another relay's cut", func(ctx SpecContext) {
			lateInBacklog(ctx)
			other := store.New(db, store.Options{MaxRows: 10, MaxBytes: 10_000})
			other.SetWatermarkTrail(time.Hour) // otherwise the machine's speed decides whether the watermark moves
			Expect(other.Cut(ctx, 0)).To(Equal(store.Cut{Batches: 4, Events: 40, More: true}))
			Expect(batches()[4][:2]).To(Equal([]int64{42, 43}))
		})

		It("cuts a late commit first in a backlog if the low watermark is due to move", func(ctx SpecContext) {
			lateInBacklog(ctx)
			db.MustExec("UPDATE outbox_cursor SET next_low_watermark_at = 'epoch'")
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 4, Events: 40, More: true}))
			Expect(batches()[4][:2]).To(Equal([]int64{1, 42}))
		})

		It("cuts a late commit at once if its id is between the ids of two batches", func(ctx SpecContext) {
			publishMany(ctx, 2)
			late := db.MustBegin()
			Expect(publisher.Publish(ctx, late, complete(outbox.Event{}))).To(Succeed())
			publishMany(ctx, 2)
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 1, Events: 4}))
			Expect(claim(ctx)).NotTo(BeNil())
			publishMany(ctx, 2)
			Expect(late.Commit()).To(Succeed())
			Expect(cut(ctx)).To(Equal(store.Cut{Batches: 1, Events: 3}))
			first := batches()[0][0]
			Expect(batches()).To(Equal([][]int64{
				{first, first + 1, first + 3, first + 4},
				{first + 2, first + 5, first + 6},
			}))
		})

		It("recovers after the database has refused an event in a second batch", func(ctx SpecContext) {
			publishMany(ctx, 3)
			cut(ctx)
			Expect(s.Poll(ctx)).To(BeTrue()) // Poll remembers the batch as the oldest
			db.MustExec("UPDATE outbox_batches SET batch_id = '00000000-0000-7000-8000-000000000000'")
			Expect(cut(ctx)).To(Equal(store.Cut{More: true}))
			Expect(sizes()).To(Equal([]int{3}))
			settleAll(ctx)
			Expect(cut(ctx)).To(BeZero())
		})

		It("marks waiting events as unverified when PostgreSQL's history changes", func(ctx SpecContext) {
			publishMany(ctx, 1)
			cut(ctx)
			publishMany(ctx, 1)
			db.MustExec("UPDATE outbox_history SET timeline = '00000000'")
			Expect(claim(ctx)).To(BeNil(), "no batch is claimed before the change is recorded")
			_, err := s.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
			publishMany(ctx, 1)

			var attempts []int
			cut(ctx) // the second event, which is unverified, and the third
			publishMany(ctx, 1)
			cut(ctx) // the fourth event, which is not unverified
			Expect(db.Select(&attempts, "SELECT attempts FROM outbox_batches ORDER BY batch_id")).To(Succeed())
			Expect(attempts).To(Equal([]int{1, 1, 0}))
			var waits []bool
			Expect(db.Select(&waits, "SELECT next_attempt_at > clock_timestamp() + interval '20 s' FROM outbox_batches ORDER BY batch_id")).To(Succeed())
			Expect(waits).To(Equal([]bool{true, true, false}), "an insert of the lost history may still be in flight")
		})
	})

	Describe("Claim", func() {
		It("counts an attempt and leases the batch to one worker", func(ctx SpecContext) {
			publishMany(ctx, 11)
			cut(ctx)
			first, second := claim(ctx), claim(ctx)
			Expect(first.Events).To(Equal(10))
			Expect(second.Events).To(Equal(1))
			Expect(claim(ctx)).To(BeNil())
			var attempts []int
			Expect(db.Select(&attempts, "SELECT attempts FROM outbox_batches")).To(Succeed())
			Expect(attempts).To(Equal([]int{1, 1}))
		})

		It("releases the batch of a worker whose connection dies, and counts the next attempt", func(ctx SpecContext) {
			publishMany(ctx, 1)
			cut(ctx)
			dead := claim(ctx)
			Expect(dead.Attempts).To(Equal(1))
			db.MustExec(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity
				WHERE datname = current_database() AND state = 'idle in transaction'`)
			Expect(dead.Verify(ctx)).To(MatchError(store.ErrLeaseLost))
			Expect(dead.Settle(ctx)).NotTo(Succeed())
			due()
			next := claim(ctx)
			Expect(next.ID).To(Equal(dead.ID))
			Expect(next.Token).To(Equal(dead.Token))
			Expect(next.Attempts).To(Equal(2))
		})

		It("alternates between failing batches and other batches", func(ctx SpecContext) {
			s = store.New(db, store.Options{MaxRows: 1})
			publishMany(ctx, 4)
			cut(ctx)
			db.MustExec("UPDATE outbox_batches SET failures = 1 WHERE event_ids && '{[1,3)}'")
			var order []string
			for range 4 {
				order = append(order, claim(ctx).EventIDs)
			}
			Expect(order).To(Equal([]string{"{[3,4)}", "{[1,2)}", "{[4,5)}", "{[2,3)}"}))
		})

		It("leaves failing batches to others on request", func(ctx SpecContext) {
			publishMany(ctx, 1)
			cut(ctx)
			Expect(claim(ctx).Fail(ctx, errors.New("refused"), 0)).To(Succeed())
			Expect(s.Claim(ctx, anyBytes, false)).To(BeNil())
			Expect(claim(ctx).Failures).To(Equal(1))
		})

		It("claims no batch if the oldest batch is too large, not even a smaller younger batch", func(ctx SpecContext) {
			publishMany(ctx, 11)
			cut(ctx)
			lease, err := s.Claim(ctx, 200, true)
			Expect(err).NotTo(HaveOccurred())
			Expect(lease).To(BeNil())
			Expect(claim(ctx).Events).To(Equal(10))
		})
	})

	Describe("Lease", func() {
		It("reads the events as published, in the order of their ids", func(ctx SpecContext) {
			published := []outbox.Event{
				{EventType: "first_thing", EventContext: outboxtest.JSON(`{"a": 1}`), Environment: "Production/eu"},
				{EventType: "second_thing", MetadataVersion: 3, EventDateTime: time.Date(1900, 1, 1, 0, 0, 0, 1000, time.UTC)},
				{EventDateTime: time.Date(2299, 12, 31, 23, 59, 59, 999_999_000, time.UTC), Traceparent: outboxtest.Traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")},
			}
			publish(ctx, db, publisher, published...)
			cut(ctx)
			lease := claim(ctx)
			var read store.Events
			Expect(lease.Read(ctx, &read)).To(Succeed())
			keys, err := lease.Keys(ctx)
			Expect(err).NotTo(HaveOccurred())
			for _, events := range []*store.Events{&read, keys} {
				Expect(events.ID).To(Equal([]int64{1, 2, 3}))
				Expect(events.EventType.Len()).To(Equal(3))
				Expect(events.Traceparent.Len()).To(Equal(3))
				for i, event := range published {
					Expect(events.EventID[i]).To(Equal(event.EventID))
					Expect(events.EventType.At(i)).To(Equal(event.EventType))
					Expect(events.EventDateTime[i]).To(Equal(event.EventDateTime.UnixMicro()))
					Expect(events.MetadataVersion[i]).To(Equal(uint64(event.MetadataVersion)))
					Expect(string(events.Traceparent.At(i))).To(Equal(event.Traceparent.String()))
					var publishedAt time.Time
					Expect(db.Get(&publishedAt, "SELECT published_at FROM outbox_events WHERE id = $1", i+1)).To(Succeed())
					Expect(events.PublishedAt[i]).To(Equal(publishedAt.UnixMicro()))
				}
			}
			Expect(contexts(&read)).To(HaveExactElements(`{"a": 1}`, "{}", "{}"))
			Expect(read.Environment.Len()).To(Equal(3))
			Expect(read.Environment.At(0)).To(Equal("Production/eu"))
			Expect(read.Environment.At(1)).To(Equal("Local"))
			Expect(keys.Environment.Len() + keys.EventContext.Len()).To(BeZero())
		})

		It("reads in the order of the ids without an index", func(ctx SpecContext) {
			session := store.Session(time.Minute)
			session["enable_indexscan"], session["enable_bitmapscan"] = "off", "on"
			db = testengines.OpenStore(suite.PostgresDSN(ctx), session)
			s = store.New(db, store.Options{})
			db.MustExec(`INSERT INTO outbox_events (id, event_type, event_context) OVERRIDING SYSTEM VALUE
				SELECT id, 'thing_happened', to_json(id) FROM generate_series(100, 1, -1) AS id`)
			db.MustExec("SELECT setval(pg_get_serial_sequence('outbox_events', 'id'), 100)")
			cut(ctx)
			var events store.Events
			Expect(claim(ctx).Read(ctx, &events)).To(Succeed())
			Expect(events.ID).To(HaveLen(100))
			Expect(slices.IsSorted(events.ID)).To(BeTrue())
			for i, id := range events.ID {
				Expect(string(events.EventContext.At(i))).To(Equal(strconv.FormatInt(id, 10)))
			}
		})

		It("cuts and reads if the session has outdated settings", func(ctx SpecContext) {
			session := store.Session(time.Minute)
			session["bytea_output"], session["standard_conforming_strings"] = "escape", "off"
			db = testengines.OpenPostgres(suite.PostgresDSN(ctx), session) // values as text, as behind a pooler
			s = store.New(db, store.Options{})
			publish(ctx, db, publisher, outbox.Event{EventContext: outboxtest.JSON(`"\\\u00e9"`)}, outbox.Event{})
			cut(ctx)
			var events store.Events
			Expect(claim(ctx).Read(ctx, &events)).To(Succeed())
			Expect(contexts(&events)).To(HaveExactElements(`"\\\u00e9"`, "{}"))
		})

		It("reads events of every size, with gaps between their ids", func(ctx SpecContext) {
			s = store.New(db, store.Options{})
			var published []string
			for i := range 3000 {
				size := i % 300
				if i%1000 == 999 {
					size = 1 << 20
				}
				published = append(published, fmt.Sprintf("%q", strings.Repeat("x", size)))
			}
			events := make([]outbox.Event, len(published))
			for i, c := range published {
				events[i].EventContext = outboxtest.JSON(c)
			}
			for some := range slices.Chunk(events, 7) {
				publish(ctx, db, publisher, some...)
				db.MustExec("SELECT nextval(pg_get_serial_sequence('outbox_events', 'id'))") // an unused id
			}
			cut(ctx)
			lease := claim(ctx)
			var read store.Events
			for range 2 { // the second time with the same memory
				Expect(lease.Read(ctx, &read)).To(Succeed())
				Expect(slices.Equal(contexts(&read), published)).To(BeTrue(), "%d events, some of them different", read.Len())
				Expect([]int{len(read.PublishedAt), read.Traceparent.Len()}).To(HaveEach(len(published)))
			}
			Expect(lease.Settle(ctx)).To(Succeed())
		})

		It("reads only the batch's events, and no other events between their ids", func(ctx SpecContext) {
			late := db.MustBegin()
			publishMany(ctx, 1)
			Expect(publisher.Publish(ctx, late, complete(outbox.Event{}))).To(Succeed())
			publishMany(ctx, 1)
			cut(ctx)
			Expect(late.Commit()).To(Succeed())

			lease := claim(ctx)
			Expect(lease.Keys(ctx)).To(HaveField("ID", []int64{1, 3}))
			var read store.Events
			Expect(lease.Read(ctx, &read)).To(Succeed())
			Expect(read.ID).To(Equal([]int64{1, 3}))
			Expect(lease.Settle(ctx)).To(Succeed())
			var left int
			Expect(db.Get(&left, "SELECT count(*) FROM outbox_events")).To(Succeed())
			Expect(left).To(Equal(1))
		})

		It("returns an error if events of the batch are missing", func(ctx SpecContext) {
			publishMany(ctx, 3)
			cut(ctx)
			db.MustExec("DELETE FROM outbox_events WHERE id = 2")
			lease := claim(ctx)
			Expect(lease.Read(ctx, &store.Events{})).To(MatchError(store.ErrEventsMissing))
			Expect(second(lease.Keys(ctx))).To(MatchError(store.ErrEventsMissing))
			Expect(lease.Settle(ctx)).To(MatchError(store.ErrLeaseLost))
			Expect(sizes()).To(Equal([]int{3}), "no event was settled")
		})

		It("deletes the settled batch and its events, and no other rows", func(ctx SpecContext) {
			publishMany(ctx, 11)
			cut(ctx)
			Expect(claim(ctx).Settle(ctx)).To(Succeed())
			Expect(sizes()).To(Equal([]int{1}))
			Expect(batches()).To(Equal([][]int64{{11}}))
		})

		It("releases the batch with the cause and a delay", func(ctx SpecContext) {
			publishMany(ctx, 1)
			cut(ctx)
			Expect(claim(ctx).Retry(ctx, errors.New("no\x00 route"), time.Hour)).To(Succeed())
			Expect(claim(ctx)).To(BeNil())
			var cause string
			Expect(db.Get(&cause, "SELECT last_error FROM outbox_batches")).To(Succeed())
			Expect(cause).To(Equal("no route"))
			due()
			Expect(claim(ctx).Attempts).To(Equal(2))
		})

		It("renews the token and releases the batch", func(ctx SpecContext) {
			publishMany(ctx, 1)
			cut(ctx)
			old := claim(ctx)
			Expect(old.RenewToken(ctx, errors.New("absent"))).To(Succeed())
			fresh := claim(ctx)
			Expect(fresh.ID).To(Equal(old.ID))
			Expect(fresh.Token).NotTo(Equal(old.Token))
			Expect(fresh.Attempts).To(Equal(1))
		})

		It("shrinks the batch under the same token, and writes dead letters", func(ctx SpecContext) {
			publishMany(ctx, 7)
			cut(ctx)
			whole := claim(ctx)
			Expect(whole.Shrink(ctx, store.Outcome{
				Delivered: []int64{1, 3},
				Refused:   []store.Refused{{ID: 4, Cause: errors.New("the year 2500")}, {ID: 7, Cause: errors.New("why,\"}{")}},
				Remaining: []int64{2, 5, 6},
			}, nil)).To(Succeed())
			Expect(batches()).To(Equal([][]int64{{2, 5, 6}}))
			var letters []struct {
				ID    int64  `db:"outbox_event_id"`
				Error string `db:"error"`
			}
			Expect(db.Select(&letters, "SELECT outbox_event_id, error FROM outbox_dead_letters ORDER BY id")).To(Succeed())
			Expect(letters).To(HaveLen(2))
			Expect(letters[0].ID).To(Equal(int64(4)))
			Expect(letters[0].Error).To(Equal("the year 2500"))
			Expect(letters[1].Error).To(Equal("why,\"}{"))
			var left []int64
			Expect(db.Select(&left, "SELECT id FROM outbox_events ORDER BY id")).To(Succeed())
			Expect(left).To(Equal([]int64{2, 5, 6}))
			remaining := claim(ctx)
			Expect(remaining.Token).To(Equal(whole.Token))
			Expect(remaining.Attempts).To(Equal(2), "the sink may know the token, so the next attempt resolves")
			Expect(remaining.Events).To(Equal(3))
			Expect(remaining.Bytes).To(Equal(whole.Bytes / 7 * 3))
		})

		It("splits the batch into two batches with new tokens, in its place", func(ctx SpecContext) {
			s = store.New(db, store.Options{MaxRows: 4})
			publishMany(ctx, 4)
			cut(ctx)
			whole := claim(ctx)
			publishMany(ctx, 4)
			cut(ctx)
			Expect(whole.Shrink(ctx, store.Outcome{Parts: [][]int64{{1, 2, 3}, {4}}}, errors.New("refused"))).To(Succeed())
			Expect(batches()).To(Equal([][]int64{{1, 2, 3}, {4}, {5, 6, 7, 8}}))
			var errs []string
			Expect(db.Select(&errs, "SELECT coalesce(last_error, '') FROM outbox_batches ORDER BY batch_id")).To(Succeed())
			Expect(errs).To(Equal([]string{"refused", "refused", ""}))
			var tokens int
			Expect(db.Get(&tokens, "SELECT count(DISTINCT token) FROM outbox_batches WHERE attempts = 0")).To(Succeed())
			Expect(tokens).To(Equal(3))
		})

		It("keeps batches in the order of their events after many splits", func(ctx SpecContext) {
			s = store.New(db, store.Options{MaxRows: 64})
			publishMany(ctx, 64)
			cut(ctx)
			var expected [][]int64
			for id := int64(1); id <= 64; id++ {
				expected = append(expected, []int64{id})
			}
			for {
				lease := claim(ctx)
				keys, err := lease.Keys(ctx)
				Expect(err).NotTo(HaveOccurred())
				if len(keys.ID) == 1 {
					lease.Release()
					break
				}
				Expect(lease.Shrink(ctx, store.Outcome{Parts: [][]int64{keys.ID[:len(keys.ID)/2], keys.ID[len(keys.ID)/2:]}}, errors.New("refused"))).To(Succeed())
			}
			Expect(batches()).To(HaveLen(7), "the first half is delivered before the second begins")
			Expect(batches()[0]).To(Equal(expected[0]))
			Expect(batches()[1]).To(Equal(expected[1]))
			Expect(batches()[6]).To(HaveLen(32))
		})

		It("keeps the token of the remaining events, and gives new tokens to the parts", func(ctx SpecContext) {
			publishMany(ctx, 6)
			cut(ctx)
			whole := claim(ctx)
			Expect(whole.Shrink(ctx, store.Outcome{
				Delivered: []int64{2}, Remaining: []int64{1, 6}, Parts: [][]int64{{3, 5}, {4}},
			}, errors.New("failed"))).To(Succeed())
			Expect(batches()).To(Equal([][]int64{{1, 6}, {3, 5}, {4}}))
			var rows []struct {
				Token    string `db:"token"`
				Attempts int    `db:"attempts"`
				Failures int    `db:"failures"`
				Error    string `db:"last_error"`
			}
			Expect(db.Select(&rows, "SELECT token, attempts, failures, last_error FROM outbox_batches ORDER BY batch_id")).To(Succeed())
			Expect(rows[0].Token).To(Equal(whole.Token))
			Expect(rows[0].Attempts).To(Equal(1))
			Expect(rows[0].Error).To(Equal("failed"))
			for _, part := range rows[1:] {
				Expect(part.Token).NotTo(Equal(whole.Token))
				Expect(part.Attempts).To(BeZero(), "the token was never attempted")
				Expect(part.Failures).To(Equal(1))
			}
			Expect(rows[1].Token).NotTo(Equal(rows[2].Token))
		})

		It("adds one batch at a time while thousands are failing", func(ctx SpecContext) {
			publishMany(ctx, 4)
			cut(ctx)
			whole := claim(ctx)
			db.MustExecContext(ctx, `INSERT INTO outbox_batches (batch_id, event_ids, event_count, byte_count, token, failures)
				SELECT gen_random_uuid(), int8multirange(int8range(id, id + 1)), 1, 1, id::text, 1 FROM generate_series(1001, 3100) AS id`)
			Expect(whole.Shrink(ctx, store.Outcome{Parts: [][]int64{{1, 3}, {2, 4}}}, errors.New("failed"))).To(Succeed())
			var events int
			Expect(db.Get(&events, "SELECT event_count FROM outbox_batches WHERE event_ids @> 1::bigint")).To(Succeed())
			Expect(events).To(Equal(4))
		})

		It("changes nothing if events are missing in the outcome", func(ctx SpecContext) {
			publishMany(ctx, 3)
			cut(ctx)
			Expect(claim(ctx).Shrink(ctx, store.Outcome{Delivered: []int64{1}, Remaining: []int64{2}}, nil)).
				To(MatchError(store.ErrLeaseLost))
			due()
			Expect(claim(ctx).Shrink(ctx, store.Outcome{Parts: [][]int64{{1}, {2}}}, errors.New("refused"))).To(MatchError(store.ErrLeaseLost))
			Expect(batches()).To(Equal([][]int64{{1, 2, 3}}))
		})
	})

	Describe("The quarantine", func() {
		BeforeEach(func(ctx SpecContext) {
			Expect(s.PutIntoQuarantine(ctx, "broken", errors.New("the view throws"))).To(Succeed())
		})

		type row struct {
			Events      int     `db:"events"`
			Attempts    int     `db:"attempts"`
			Failures    int     `db:"failures"`
			Quarantined bool    `db:"quarantined"`
			Wait        float64 `db:"wait"`
		}
		rows := func() (rows []row) {
			GinkgoHelper()
			Expect(db.Select(&rows, `SELECT event_count AS events, attempts, failures, quarantined,
				CASE WHEN next_attempt_at > clock_timestamp() THEN extract(epoch FROM next_attempt_at - clock_timestamp()) ELSE 0 END AS wait
				FROM outbox_batches ORDER BY quarantined, batch_id`)).To(Succeed())
			return rows
		}
		setAside := func(ctx context.Context, events, aside int) {
			GinkgoHelper()
			publishMany(ctx, events)
			cut(ctx)
			lease := claim(ctx)
			keys, err := lease.Keys(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(lease.SetAside(ctx, keys.ID[:aside], keys.ID[aside:])).To(Succeed())
		}

		It("is known to all relays from the next poll on", func(ctx SpecContext) {
			Expect(s.IsQuarantined("broken")).To(BeTrue())
			other := store.New(db, store.Options{})
			_, err := other.Poll(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(other.Quarantine()).To(Equal([]string{"broken"}))
			Expect(other.EndQuarantine(ctx, []string{"broken"})).To(Succeed())
			_, err = s.Poll(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(s.IsQuarantined("broken")).To(BeFalse())
		})

		It("leaves the other events in their batch, as if it was never attempted", func(ctx SpecContext) {
			setAside(ctx, 5, 2)
			left := rows()
			Expect(left).To(HaveLen(2))
			Expect(left[0]).To(Equal(row{Events: 3}))
			Expect(left[1].Events).To(Equal(2))
			Expect(left[1].Quarantined).To(BeTrue())
			Expect(left[1].Wait).To(And(BeNumerically(">", 0), BeNumerically("<=", 30)))
			Expect(claim(ctx).Attempts).To(Equal(1))
		})

		It("collects events in one batch until its first attempt", func(ctx SpecContext) {
			for range 3 {
				setAside(ctx, 2, 2)
			}
			Expect(rows()).To(HaveLen(1))
			Expect(rows()[0].Events).To(Equal(6))
			due()
			lease := claim(ctx)
			keys, err := lease.Keys(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(keys.ID).To(Equal([]int64{1, 2, 3, 4, 5, 6}))
			setAside(ctx, 2, 2) // the first batch is locked
			Expect(lease.Fail(ctx, errors.New("failed"), time.Minute)).To(Succeed())
			setAside(ctx, 2, 2)
			Expect(rows()).To(HaveLen(2))
			Expect(rows()[1].Events).To(Equal(4))
			Expect(rows()[1].Wait).To(BeNumerically(">", 30), "the more batches have failed, the longer the next waits")
		})

		It("tries a batch of broken types less often for each other such batch", func(ctx SpecContext) {
			for range 2 {
				publishMany(ctx, 1)
				cut(ctx)
				Expect(claim(ctx).Hold(ctx, errors.New("failed"))).To(Succeed())
			}
			Expect(rows()).To(HaveExactElements(
				And(HaveField("Quarantined", true), HaveField("Wait", And(BeNumerically(">", 0), BeNumerically("<=", 30)))),
				And(HaveField("Quarantined", true), HaveField("Wait", And(BeNumerically(">", 30), BeNumerically("<=", 60))))))
			Expect(s.EndQuarantine(ctx, []string{"broken"})).To(Succeed())
			for _, held := range rows() {
				Expect(held.Wait).To(BeZero())
			}
		})

		It("makes collected batches due when it ends", func(ctx SpecContext) {
			setAside(ctx, 2, 2)
			Expect(s.EndQuarantine(ctx, []string{"broken"})).To(Succeed())
			Expect(rows()).To(Equal([]row{{Events: 2, Failures: 1}}))
		})

		It("does not make a batch due that waits for inserts of a lost history", func(ctx SpecContext) {
			setAside(ctx, 2, 2)
			db.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
			_, err := s.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
			Expect(s.EndQuarantine(ctx, []string{"broken"})).To(Succeed())
			Expect(rows()).To(HaveExactElements(HaveField("Wait", BeNumerically(">", 20))))
		})

		It("refuses a batch that was attempted before", func(ctx SpecContext) {
			publishMany(ctx, 2)
			cut(ctx)
			Expect(claim(ctx).Retry(ctx, errors.New("failed"), 0)).To(Succeed())
			Expect(claim(ctx).SetAside(ctx, []int64{1}, []int64{2})).To(MatchError(store.ErrLeaseLost))
		})
	})

	Describe("The fuse", func() {
		count := func(ctx context.Context, events int) bool {
			GinkgoHelper()
			publishMany(ctx, 1)
			cut(ctx)
			lease := claim(ctx)
			allowed, err := lease.AllowDeadLetters(ctx, events)
			Expect(err).NotTo(HaveOccurred())
			Expect(lease.Settle(ctx)).To(Succeed())
			return allowed
		}
		blown := func(ctx context.Context) error {
			GinkgoHelper()
			other := store.New(db, store.Options{}) // another relay
			_, err := other.Poll(ctx)
			Expect(err).NotTo(HaveOccurred())
			return other.Fuse()
		}

		BeforeEach(func() { s = store.New(db, store.Options{MaxDeadLetters: 10}) })

		It("blows at the bound of an hour, for all relays, until an operator mends it", func(ctx SpecContext) {
			Expect(count(ctx, 9)).To(BeTrue())
			Expect(count(ctx, 1)).To(BeTrue())
			Expect(blown(ctx)).To(Succeed())
			Expect(count(ctx, 1)).To(BeFalse())
			Expect(s.Fuse()).To(MatchError(ContainSubstring("relay dead-letters resume")))
			Expect(blown(ctx)).To(BeAssignableToTypeOf(&store.FuseBlownError{}))
			db.MustExecContext(ctx, "UPDATE outbox_fuse SET since = since - interval '2 hours'")
			Expect(count(ctx, 1)).To(BeFalse(), "a later hour does not mend it")

			Expect(s.MendFuse(ctx, "an operator")).To(BeTrue())
			Expect(blown(ctx)).To(Succeed())
			Expect(count(ctx, 10)).To(BeTrue())
			Expect(count(ctx, 1)).To(BeFalse())
			Expect(s.MendFuse(ctx, "an operator")).To(BeTrue())
			Expect(s.MendFuse(ctx, "an operator")).To(BeFalse())
		})

		It("makes failing batches due when it is mended, but not unverified batches", func(ctx SpecContext) {
			Expect(count(ctx, 11)).To(BeFalse())
			publishMany(ctx, 1)
			cut(ctx)
			Expect(claim(ctx).Fail(ctx, errors.New("failed"), time.Hour)).To(Succeed())
			db.MustExecContext(ctx, "UPDATE outbox_history SET timeline = '00000000'")
			_, err := s.Cut(ctx, 0)
			Expect(err).To(MatchError(store.ErrHistoryChanged))
			Expect(s.MendFuse(ctx, "an operator")).To(BeTrue())
			Expect(claim(ctx)).To(BeNil(), "an insert of the lost history may still be in flight")

			due()
			Expect(claim(ctx).Fail(ctx, errors.New("failed"), time.Hour)).To(Succeed())
			db.MustExecContext(ctx, "UPDATE outbox_fuse SET blown_at = now()")
			Expect(s.MendFuse(ctx, "an operator")).To(BeTrue())
			Expect(claim(ctx)).NotTo(BeNil())
		})

		It("counts again in the next hour, also if the clock was set back", func(ctx SpecContext) {
			for _, shift := range []string{"- interval '61 minutes'", "+ interval '1 minute'"} {
				Expect(count(ctx, 10)).To(BeTrue())
				db.MustExecContext(ctx, "UPDATE outbox_fuse SET since = since "+shift)
			}
			Expect(count(ctx, 10)).To(BeTrue())
			Expect(count(ctx, 1)).To(BeFalse())
		})

		It("allows a hundredth of the events that were cut in the hour", func(ctx SpecContext) {
			Expect(count(ctx, 10)).To(BeTrue())
			db.MustExecContext(ctx, "UPDATE outbox_fuse SET high_watermark = high_watermark - 5000")
			Expect(count(ctx, 40)).To(BeTrue())
			Expect(count(ctx, 1)).To(BeFalse())
		})

		It("blows at once if a batch has more dead letters than the bound, also after its row was deleted", func(ctx SpecContext) {
			db.MustExecContext(ctx, "TRUNCATE outbox_fuse")
			Expect(count(ctx, 11)).To(BeFalse())
			Expect(blown(ctx)).To(HaveOccurred())
		})
	})

	It("makes the server release the locks of a dead worker after a time", func(ctx SpecContext) {
		var unbounded []string
		Expect(db.SelectContext(ctx, &unbounded, `SELECT name FROM pg_settings
			WHERE name IN ('idle_in_transaction_session_timeout', 'statement_timeout', 'lock_timeout', 'tcp_keepalives_idle',
				'tcp_keepalives_interval', 'tcp_keepalives_count', 'tcp_user_timeout') AND (setting = '0' OR source != 'session')`)).To(Succeed())
		Expect(unbounded).To(BeEmpty())
	})

	It("counts the backlog, its age, batches and dead letters", func(ctx SpecContext) {
		empty, err := s.Stats(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(empty.SizeBytes).To(BeNumerically(">", 0))
		empty.SizeBytes = 0
		Expect(empty).To(Equal(store.Stats{Batches: map[store.BatchState]store.BatchStats{}, DeadLetterTypes: map[string]int64{}}))
		publishMany(ctx, 12)
		cut(ctx)
		publishMany(ctx, 3)
		db.MustExec(`INSERT INTO outbox_dead_letters (outbox_event_id, event_id, event_type, event_date_time,
			environment, event_context, metadata_version, published_at, batch_id, token, error)
			SELECT id, event_id, event_type, event_date_time, environment, event_context, 1, published_at,
			gen_random_uuid(), 'of the batch', 'why' FROM outbox_events WHERE id = 1`)
		stats, err := s.Stats(ctx)
		Expect(err).NotTo(HaveOccurred())
		Expect(stats.BacklogEvents).To(Equal(int64(15)))
		Expect(stats.BatchCount()).To(Equal(int64(2)))
		Expect(stats.Batches[store.Unclaimed]).To(And(HaveField("Batches", int64(2)), HaveField("Events", int64(12)),
			HaveField("OldestSeconds", BeNumerically(">", 0))))
		Expect(stats.DeadLetters).To(Equal(int64(1)))
		Expect(stats.DeadLetterTypes).To(Equal(map[string]int64{"thing_happened": 1}))
		Expect(stats.OldestSeconds).To(BeNumerically(">", 0))
	})

	Describe("A large backlog", func() {
		BeforeEach(func() { s = store.New(db, store.Options{MaxRows: 5_000}) })

		// backlog returns the estimate, and the number of events.
		backlog := func(ctx context.Context) (estimate, events int64) {
			GinkgoHelper()
			stats, err := s.Stats(ctx)
			Expect(err).NotTo(HaveOccurred())
			Expect(db.GetContext(ctx, &events, "SELECT count(*) FROM outbox_events")).To(Succeed())
			return stats.BacklogEvents, events
		}
		expectClose := func(ctx context.Context) {
			GinkgoHelper()
			estimate, events := backlog(ctx)
			Expect(estimate).To(BeNumerically("~", events, events/20))
		}
		count := func(ctx context.Context) {
			GinkgoHelper()
			_, _ = backlog(ctx) // asks for a count
			for more := true; more; {
				var err error
				more, err = s.CountBacklog(ctx)
				Expect(err).NotTo(HaveOccurred())
			}
		}
		// skip leaves a gap of n ids.
		skip := func(ctx context.Context, n int) {
			GinkgoHelper()
			db.MustExecContext(ctx, "SELECT setval(pg_get_serial_sequence('outbox_events', 'id'), nextval(pg_get_serial_sequence('outbox_events', 'id')) + $1)", n)
		}

		It("is estimated without a count", func(ctx SpecContext) {
			publishMany(ctx, 11_000)
			Expect(s.Stats(ctx)).To(HaveField("BacklogEvents", int64(11_000)))
		})

		It("is counted although ids have gaps", func(ctx SpecContext) {
			publishMany(ctx, 25_000)
			skip(ctx, 1_000_000)
			publishMany(ctx, 25_000)
			db.MustExecContext(ctx, "DELETE FROM outbox_events WHERE id % 10 = 0")
			count(ctx)
			expectClose(ctx)

			By("publishing more behind another gap")
			skip(ctx, 1_000_000)
			publishMany(ctx, 12_000)
			count(ctx)
			expectClose(ctx)

			By("cutting and settling batches")
			Expect(cut(ctx).Batches).To(Equal(4))
			Expect(claim(ctx).Settle(ctx)).To(Succeed())
			expectClose(ctx)
			count(ctx)
			expectClose(ctx)
		})

		It("is counted again for transactions that commit late", func(ctx SpecContext) {
			late := db.MustBegin()
			defer func() { _ = late.Rollback() }()
			late.MustExecContext(ctx, "INSERT INTO outbox_events (event_type, event_context) SELECT 'a', '{}' FROM generate_series(1, 20000)")
			publishMany(ctx, 25_000)
			count(ctx)
			Expect(late.Commit()).To(Succeed())
			count(ctx)
			count(ctx)
			expectClose(ctx)
		})

		It("is counted anew after the cursor was set back", func(ctx SpecContext) {
			publishMany(ctx, 25_000)
			cut(ctx)
			count(ctx)
			db.MustExecContext(ctx, "UPDATE outbox_cursor SET high_watermark = 0; DELETE FROM outbox_batches")
			count(ctx)
			expectClose(ctx)
		})

		It("is not counted if nobody asks for it", func(ctx SpecContext) {
			publishMany(ctx, 25_000)
			skip(ctx, 1_000_000)
			publishMany(ctx, 25_000)
			Expect(s.CountBacklog(ctx)).To(BeFalse())
			Expect(s.Stats(ctx)).To(HaveField("BacklogEvents", BeNumerically(">", 1_000_000)))
		})
	})
})
