package users_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gstruct"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/users"
)

const traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

var _ = Describe("Creating a user", func() {
	It("inserts the user and publishes one user_created event with the user's data", func(ctx SpecContext) {
		ada := newUser("  Ada.Lovelace@Example.COM\n", " Ada ", "Lovelace & <Söhne>")
		ada.Traceparent = outboxtest.Traceparent(traceparent)
		created, err := newService(db).Create(ctx, ada)
		Expect(err).NotTo(HaveOccurred())
		Expect(created).To(gstruct.MatchAllFields(gstruct.Fields{
			"ID":        WithTransform(uuid.UUID.Version, Equal(uuid.Version(7))),
			"Email":     HaveField("String()", "Ada.Lovelace@example.com"),
			"FirstName": HaveField("String()", "Ada"),
			"LastName":  HaveField("String()", "Lovelace & <Söhne>"),
			"CreatedAt": SatisfyAll(BeTemporally("~", time.Now(), time.Minute), HaveField("Location()", time.UTC)),
			"UpdatedAt": Equal(created.CreatedAt),
		}))

		var events []struct {
			EventID         uuid.UUID `db:"event_id"`
			EventType       string    `db:"event_type"`
			EventDateTime   time.Time `db:"event_date_time"`
			Environment     string    `db:"environment"`
			EventContext    string    `db:"event_context"`
			MetadataVersion int64     `db:"metadata_version"`
			Traceparent     string    `db:"traceparent"`
		}
		Expect(db.SelectContext(ctx, &events, `
			SELECT event_id, event_type, event_date_time, environment, event_context, metadata_version, traceparent
			FROM outbox_events`)).To(Succeed())
		Expect(events).To(HaveLen(1))
		Expect(events[0].EventID.Version()).To(Equal(uuid.Version(7)))
		Expect(events[0].EventType).To(Equal("user_created"))
		Expect(events[0].EventDateTime).To(BeTemporally("==", created.CreatedAt))
		Expect(events[0].Environment).To(Equal("Test"))
		Expect(events[0].MetadataVersion).To(BeEquivalentTo(1))
		Expect(events[0].Traceparent).To(Equal(traceparent))
		Expect(events[0].EventContext).To(Equal(fmt.Sprintf(
			`{"user_id":"%s","email":"Ada.Lovelace@example.com","first_name":"Ada","last_name":"Lovelace & <Söhne>"}`,
			created.ID)))
	})

	It("returns the same user that later reads return", func(ctx SpecContext) {
		service := newService(db)
		created, err := service.Create(ctx, newUser("ada@example.com", "Ada", ""))
		Expect(err).NotTo(HaveOccurred())
		Expect(service.Get(ctx, created.ID)).To(Equal(created))
		page, err := service.List(ctx, listParams("", 1, ""))
		Expect(err).NotTo(HaveOccurred())
		Expect(page.Users).To(ConsistOf(created))
	})

	It("publishes missing names as empty strings", func(ctx SpecContext) {
		created, err := newService(db).Create(ctx, addressed("ada@example.com"))
		Expect(err).NotTo(HaveOccurred())
		var payload string
		Expect(db.GetContext(ctx, &payload, "SELECT event_context FROM outbox_events")).To(Succeed())
		Expect(payload).To(Equal(fmt.Sprintf(
			`{"user_id":"%s","email":"ada@example.com","first_name":"","last_name":""}`, created.ID)))
	})

	It("is refused by the database if the address is missing", func(ctx SpecContext) {
		_, err := newService(db).Create(ctx, users.NewUser{})
		Expect(err).To(MatchError(ContainSubstring("users_email_is_short")))
		Expect(countUsers(ctx) + countEvents(ctx)).To(BeZero())
	})

	It("refuses an address that is taken in another case, and publishes nothing", func(ctx SpecContext) {
		service := newService(db)
		_, err := service.Create(ctx, addressed("ada@example.com"))
		Expect(err).NotTo(HaveOccurred())
		_, err = service.Create(ctx, addressed("ADA@Example.Com"))
		Expect(err).To(MatchError(users.ErrEmailTaken))
		Expect(countUsers(ctx)).To(Equal(1))
		Expect(countEvents(ctx)).To(Equal(1))
	})

	It("creates 200 users and 200 events in 1,000 concurrent creates of 200 addresses", func(ctx SpecContext) {
		service := newService(db)
		var group sync.WaitGroup
		results := make(chan error, 1000)
		for i := range 1000 {
			group.Go(func() {
				email := fmt.Sprintf("user%d@example.com", i%200)
				if i%2 == 1 {
					email = strings.ToUpper(email)
				}
				_, err := service.Create(ctx, addressed(email))
				results <- err
			})
		}
		group.Wait()
		close(results)
		created := 0
		for err := range results {
			if err == nil {
				created++
				continue
			}
			Expect(err).To(MatchError(users.ErrEmailTaken))
		}
		Expect(created).To(Equal(200))
		Expect(countUsers(ctx)).To(Equal(200))
		Expect(count(ctx, `
			SELECT count(DISTINCT users.id)
			FROM users
			JOIN outbox_events ON event_context->>'user_id' = users.id::text
				AND event_context->>'email' = users.email`)).To(Equal(200))
		Expect(countEvents(ctx)).To(Equal(200))
	})

	It("fails if another transaction holds the address for longer than lockTimeout", SpecTimeout(time.Minute), func(ctx SpecContext) {
		other := db.MustBegin()
		_, err := newService(db).Service.Create(ctx, other, addressed("ada@example.com"))
		Expect(err).NotTo(HaveOccurred())
		s := newService(db)
		create := func(emails ...string) (results []users.Result, err error) {
			news := make([]users.NewUser, len(emails))
			for i, email := range emails {
				news[i] = addressed(email)
			}
			err = postgres.InStatement(ctx, db, func(q *postgres.Statement) (err error) {
				results, err = s.CreateMany(ctx, q, news, users.ManyOptions{LockTimeout: time.Millisecond})
				return err
			})
			return results, err
		}
		_, err = create("Ada@example.com", "bob@example.com")
		refused, ok := errors.AsType[*pq.Error](err)
		Expect(ok).To(BeTrue(), "%v", err)
		Expect(refused.Code).To(Equal(pqerror.LockNotAvailable))
		Expect(countUsers(ctx) + countEvents(ctx)).To(BeZero())

		Expect(other.Commit()).To(Succeed())
		Expect(create("Ada@example.com", "bob@example.com")).To(HaveExactElements(
			HaveField("Err", MatchError(users.ErrEmailTaken)), HaveField("User.Email.String()", "bob@example.com")))
		Expect(countEvents(ctx)).To(Equal(2))
	})

	Describe("writes both the user and the event or neither", func() {
		It("when the event is invalid", func(ctx SpecContext) {
			_, err := newServiceWith(db, outbox.PublisherOptions{MaxEventBytes: 1}).Create(ctx, addressed("ada@example.com"))
			var invalid *outbox.ValidationError
			Expect(errors.As(err, &invalid)).To(BeTrue())
			Expect(countUsers(ctx)).To(BeZero())
			Expect(countEvents(ctx)).To(BeZero())
		})

		It("when the database refuses the commit", func(ctx SpecContext) {
			_, err := db.ExecContext(ctx, `
				CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'refused'; END $$;
				CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON users
					DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()`)
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(func(ctx SpecContext) {
				_, err := db.ExecContext(ctx, "DROP FUNCTION refuse CASCADE")
				Expect(err).NotTo(HaveOccurred())
			})
			_, err = newService(db).Create(ctx, addressed("ada@example.com"))
			Expect(err).To(MatchError(ContainSubstring("refused")))
			Expect(err).NotTo(MatchError(postgres.ErrOutcomeUnknown))
			Expect(countUsers(ctx)).To(BeZero())
			Expect(countEvents(ctx)).To(BeZero())
		})

		It("when the caller's context ends", func(ctx SpecContext) {
			// An uncommitted insert of the same address blocks the create.
			tx, err := db.BeginTxx(ctx, nil)
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(func() { _ = tx.Rollback() })
			_, err = tx.ExecContext(ctx, `
				INSERT INTO users (id, email, created_at, updated_at)
				VALUES (gen_random_uuid(), 'ada@example.com', now(), now())`)
			Expect(err).NotTo(HaveOccurred())

			waiting, giveUp := context.WithCancel(ctx)
			result := make(chan error, 1)
			go func() {
				_, err := newService(db).Create(waiting, addressed("ada@example.com"))
				result <- err
			}()
			Eventually(ctx, func() int {
				return count(ctx, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
			}).Should(Equal(1))
			giveUp()
			Eventually(ctx, result).Should(Receive(HaveOccurred()))
			Expect(tx.Rollback()).To(Succeed())
			Consistently(ctx, func() int { return countUsers(ctx) + countEvents(ctx) }, "100ms").Should(BeZero())
		})

		DescribeTable("and reports an unknown outcome when the connection is lost during the commit",
			func(ctx SpecContext, forward bool, want int) {
				proxied := testengines.OpenPostgres(proxyLosingCommits(ctx, dsn, forward), nil)
				_, err := newService(proxied).Create(ctx, addressed("ada@example.com"))
				Expect(err).To(MatchError(postgres.ErrOutcomeUnknown))
				Eventually(ctx, countUsers).WithArguments(ctx).Should(Equal(want))
				Expect(countEvents(ctx)).To(Equal(want))
			},
			Entry("after the server has committed", true, 1),
			Entry("before the server has received the commit", false, 0),
		)
	})
})
