package users_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/pkg/outbox/outboxtest"
	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/pkg/users"
)

func (s service) Update(ctx context.Context, changes ...users.Change) (results []users.Result, err error) {
	err = postgres.InTx(ctx, s.db, func(tx *sqlx.Tx) (err error) {
		results, err = s.Service.Update(ctx, tx, changes)
		return err
	})
	return results, err
}

func (s service) Delete(ctx context.Context, deletions ...users.Deletion) (errs []error, err error) {
	err = postgres.InTx(ctx, s.db, func(tx *sqlx.Tx) (err error) {
		errs, err = s.Service.Delete(ctx, tx, deletions)
		return err
	})
	return errs, err
}

// have creates a user with the address.
func (s service) have(ctx context.Context, email string) users.User {
	GinkgoHelper()
	created, err := s.Create(ctx, newUser(email, "Ada", "Lovelace"))
	Expect(err).NotTo(HaveOccurred())
	return created
}

// changeOf returns a change of the user's address.
func changeOf(id uuid.UUID, email string) users.Change {
	GinkgoHelper()
	change, err := users.ParseChange(&email, nil, nil)
	Expect(err).NotTo(HaveOccurred())
	change.ID = id
	return change
}

var _ = Describe("A change", func() {
	text := func(s string) *string { return &s }

	It("has only the values that are given", func() {
		change, err := users.ParseChange(nil, text(" Ada "), nil)
		Expect(err).NotTo(HaveOccurred())
		Expect(change.Email).To(BeNil())
		Expect(change.FirstName).To(HaveValue(HaveField("String()", "Ada")))
		Expect(change.LastName).To(BeNil())
	})

	It("is refused with every broken rule", func() {
		change, err := users.ParseChange(text(""), text("\x00"), text("\u202e"))
		invalid, ok := errors.AsType[*users.ValidationError](err)
		Expect(ok).To(BeTrue(), "%v", err)
		Expect(invalid.Fields).To(HaveExactElements(
			HaveField("Field", "email"), HaveField("Field", "first_name"), HaveField("Field", "last_name")))
		Expect(change).To(BeZero())
	})
})

var _ = Describe("Updating users", func() {
	It("returns the same user that later reads return", func(ctx SpecContext) {
		service := newService(db)
		ada := service.have(ctx, "ada@example.com")
		results, err := service.Update(ctx, changeOf(ada.ID, "bob@example.com"))
		Expect(err).NotTo(HaveOccurred())
		Expect(results).To(HaveLen(1))
		Expect(results[0].Err).NotTo(HaveOccurred())
		Expect(service.Get(ctx, ada.ID)).To(Equal(results[0].User))
		Expect(results[0].User).To(And(HaveField("CreatedAt", ada.CreatedAt), HaveField("FirstName", ada.FirstName),
			HaveField("UpdatedAt", BeTemporally(">", ada.UpdatedAt))))
	})

	It("calls If with the present user", func(ctx SpecContext) {
		service := newService(db)
		ada := service.have(ctx, "ada@example.com")
		var seen []users.User
		condition := func(meets bool) func(users.User) bool {
			return func(u users.User) bool {
				seen = append(seen, u)
				return meets
			}
		}
		met, unmet := changeOf(ada.ID, "bob@example.com"), changeOf(ada.ID, "eve@example.com")
		met.If, unmet.If = condition(true), condition(false)
		results, err := service.Update(ctx, met, unmet)
		Expect(err).NotTo(HaveOccurred())
		Expect(results[1]).To(Equal(users.Result{Err: users.ErrModified}))
		Expect(seen).To(Equal([]users.User{ada, results[0].User}))
		unmet.ID = uuid.New()
		Expect(service.Update(ctx, unmet)).To(Equal([]users.Result{{Err: users.ErrNotFound}}))
		Expect(seen).To(HaveLen(2))
		Expect(service.Get(ctx, ada.ID)).To(Equal(results[0].User))
	})

	It("writes nothing for an empty list, and for users that do not change", func(ctx SpecContext) {
		service := newService(db)
		ada := service.have(ctx, "ada@example.com")
		Expect(service.Update(ctx)).To(BeEmpty())
		version := func() (xmin string) {
			Expect(db.GetContext(ctx, &xmin, "SELECT xmin::text FROM users")).To(Succeed())
			return xmin
		}
		before := version()
		Expect(service.Update(ctx, changeOf(ada.ID, "ada@example.com"), users.Change{ID: ada.ID})).
			To(Equal([]users.Result{{User: ada}, {User: ada}}))
		Expect(version()).To(Equal(before))
		Expect(countEvents(ctx)).To(Equal(1))
	})

	It("keeps the trace context of each change", func(ctx SpecContext) {
		service := newService(db)
		traced := changeOf(service.have(ctx, "ada@example.com").ID, "ada2@example.com")
		traced.Traceparent = outboxtest.Traceparent(traceparent)
		_, err := service.Update(ctx, traced, changeOf(service.have(ctx, "bob@example.com").ID, "bob2@example.com"))
		Expect(err).NotTo(HaveOccurred())
		var traces []string
		Expect(db.SelectContext(ctx, &traces, `SELECT coalesce(traceparent, '') FROM outbox_events
			WHERE event_type = 'user_updated' ORDER BY id`)).To(Succeed())
		Expect(traces).To(Equal([]string{traceparent, ""}))
	})

	DescribeTable("returns a conflict if another transaction inserts one of the addresses between the check and the change",
		func(ctx SpecContext, address string) {
			service := newService(db)
			ada, bob := service.have(ctx, "ada@example.com"), service.have(ctx, "bob@example.com")
			other := db.MustBegin()
			defer func() { _ = other.Rollback() }()
			_, err := service.Service.Create(ctx, other, addressed("new@example.com"))
			Expect(err).NotTo(HaveOccurred())
			failed := make(chan error, 1)
			go func() {
				_, err := service.Update(ctx, changeOf(bob.ID, "bob2@example.com"), changeOf(ada.ID, address))
				failed <- err
			}()
			Eventually(ctx, func() int {
				return count(ctx, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
			}).Should(Equal(1))
			Expect(other.Commit()).To(Succeed())
			Eventually(ctx, failed).Should(Receive(&err))
			Expect(postgres.IsConflict(err)).To(BeTrue(), "%v", err)
			Expect(postgres.IsUniqueViolation(err, "users_email_key")).To(BeTrue(), "%v", err)
			Expect(service.Get(ctx, ada.ID)).To(Equal(ada))
			Expect(service.Get(ctx, bob.ID)).To(Equal(bob))
			Expect(countEvents(ctx)).To(Equal(3))

			By("refusing the address when the transaction is repeated")
			results, err := service.Update(ctx, changeOf(bob.ID, "bob2@example.com"), changeOf(ada.ID, address))
			Expect(err).NotTo(HaveOccurred())
			Expect(results).To(HaveExactElements(HaveField("Err", BeNil()), Equal(users.Result{Err: users.ErrEmailTaken})))
		},
		Entry("in the same case", "new@example.com"),
		Entry("in another case", "NEW@example.com"),
	)

	It("returns another violation unchanged", func(ctx SpecContext) {
		service := newService(db)
		ada := service.have(ctx, "ada@example.com")
		_, err := db.ExecContext(ctx, "ALTER TABLE users ADD CONSTRAINT only_ada CHECK (email LIKE 'ada@%')")
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func(ctx SpecContext) { db.MustExecContext(ctx, "ALTER TABLE users DROP CONSTRAINT only_ada") })
		_, err = service.Update(ctx, changeOf(ada.ID, "bob@example.com"))
		Expect(err).To(MatchError(And(HavePrefix("update users: "), ContainSubstring("only_ada"))))
		Expect(postgres.IsConflict(err)).To(BeFalse())
	})
})

var _ = Describe("Deleting users", func() {
	It("calls If with the present user, and not for a missing user", func(ctx SpecContext) {
		service := newService(db)
		ada, bob := service.have(ctx, "ada@example.com"), service.have(ctx, "bob@example.com")
		var seen []users.User
		isBob := func(u users.User) bool {
			seen = append(seen, u)
			return u.ID == bob.ID
		}
		Expect(service.Delete(ctx, users.Deletion{ID: ada.ID, If: isBob}, users.Deletion{ID: bob.ID, If: isBob},
			users.Deletion{ID: bob.ID, If: isBob}, users.Deletion{ID: uuid.New(), If: isBob})).
			To(HaveExactElements(MatchError(users.ErrModified), BeNil(), BeNil(), BeNil()))
		Expect(seen).To(Equal([]users.User{ada, bob}))
		Expect(service.Delete(ctx)).To(BeEmpty())
		Expect(countUsers(ctx)).To(Equal(1))
		Expect(count(ctx, "SELECT count(*) FROM outbox_events WHERE event_type = 'user_deleted'")).To(Equal(1))
	})

	It("publishes only the id", func(ctx SpecContext) {
		service := newService(db)
		ada := service.have(ctx, "ada@example.com")
		Expect(service.Delete(ctx, users.Deletion{ID: ada.ID, Traceparent: outboxtest.Traceparent(traceparent)})).To(HaveExactElements(BeNil()))
		var payload, trace string
		Expect(db.QueryRowContext(ctx, "SELECT event_context, traceparent FROM outbox_events WHERE event_type = 'user_deleted'").
			Scan(&payload, &trace)).To(Succeed())
		Expect(payload).To(Equal(fmt.Sprintf(`{"user_id":"%s"}`, ada.ID)))
		Expect(trace).To(Equal(traceparent))
	})
})

var _ = Describe("A change or deletion of a user", func() {
	// Each function changes the user in tx.
	update := func(ctx context.Context, s service, tx *sqlx.Tx, u users.User) error {
		_, err := s.Service.Update(ctx, tx, []users.Change{changeOf(u.ID, "bob@example.com")})
		return err
	}
	remove := func(ctx context.Context, s service, tx *sqlx.Tx, u users.User) error {
		_, err := s.Service.Delete(ctx, tx, []users.Deletion{{ID: u.ID}})
		return err
	}

	It("does not deadlock with others that have the same users in another order", func(ctx SpecContext) {
		s := newService(db)
		first, second, third := s.have(ctx, "a@example.com"), s.have(ctx, "b@example.com"), s.have(ctx, "c@example.com")
		holder := db.MustBegin()
		defer func() { _ = holder.Rollback() }()
		holder.MustExecContext(ctx, "SELECT FROM users WHERE id = $1 FOR UPDATE", second.ID)
		failures := make(chan error, 4)
		for _, order := range [][]users.User{{first, second, third}, {third, second, first}} {
			go func() {
				defer GinkgoRecover()
				var changes []users.Change
				for _, u := range order {
					changes = append(changes, changeOf(u.ID, u.Email.String()+".example"))
				}
				_, err := s.Update(ctx, changes...)
				failures <- err
			}()
			go func() {
				_, err := s.Delete(ctx, users.Deletion{ID: order[0].ID}, users.Deletion{ID: order[1].ID}, users.Deletion{ID: order[2].ID})
				failures <- err
			}()
		}
		Eventually(ctx, func() int {
			return count(ctx, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
		}).Should(Equal(cap(failures)))
		Expect(holder.Rollback()).To(Succeed())
		for range cap(failures) {
			Eventually(ctx, failures).Should(Receive(BeNil()))
		}
		Expect(countUsers(ctx)).To(BeZero())
	})

	for name, change := range map[string]func(context.Context, service, *sqlx.Tx, users.User) error{"update": update, "deletion": remove} {
		Describe("writes both the "+name+" and the event or neither", func() {
			It("when the caller rolls back", func(ctx SpecContext) {
				s := newService(db)
				ada := s.have(ctx, "ada@example.com")
				failure := errors.New("a failure after the change")
				Expect(postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
					Expect(change(ctx, s, tx, ada)).To(Succeed())
					var events int
					Expect(tx.GetContext(ctx, &events, "SELECT count(*) FROM outbox_events")).To(Succeed())
					Expect(events).To(Equal(2))
					return failure
				})).To(MatchError(failure))
				Expect(s.Get(ctx, ada.ID)).To(Equal(ada))
				Expect(countEvents(ctx)).To(Equal(1))
			})

			It("when the event is invalid", func(ctx SpecContext) {
				ada := newService(db).have(ctx, "ada@example.com")
				strict := newServiceWith(db, outbox.PublisherOptions{MaxEventBytes: 1})
				err := postgres.InTx(ctx, db, func(tx *sqlx.Tx) error { return change(ctx, strict, tx, ada) })
				_, invalid := errors.AsType[*outbox.ValidationError](err)
				Expect(invalid).To(BeTrue(), "%v", err)
				Expect(strict.Get(ctx, ada.ID)).To(Equal(ada))
				Expect(countEvents(ctx)).To(Equal(1))
			})

			It("when its time is not a time of an event", func(ctx SpecContext) {
				s := newService(db)
				ada := s.have(ctx, "ada@example.com")
				db.MustExecContext(ctx, "UPDATE users SET updated_at = '2400-01-01Z'")
				Expect(postgres.InTx(ctx, db, func(tx *sqlx.Tx) error { return change(ctx, s, tx, ada) })).To(HaveOccurred())
				Expect(s.Get(ctx, ada.ID)).To(HaveField("UpdatedAt", BeTemporally("==", time.Date(2400, 1, 1, 0, 0, 0, 0, time.UTC))))
				Expect(countEvents(ctx)).To(Equal(1))
			})

			DescribeTable("and reports an unknown outcome when the connection is lost during the commit",
				func(ctx SpecContext, forward bool, events int) {
					ada := newService(db).have(ctx, "ada@example.com")
					proxied := testengines.OpenPostgres(proxyLosingCommits(ctx, dsn, forward), nil)
					s := newService(proxied)
					Expect(postgres.InTx(ctx, proxied, func(tx *sqlx.Tx) error { return change(ctx, s, tx, ada) })).
						To(MatchError(postgres.ErrOutcomeUnknown))
					Eventually(ctx, countEvents).WithArguments(ctx).Should(Equal(events))
					Expect(count(ctx, "SELECT count(*) FROM users WHERE email = 'ada@example.com'")).To(Equal(2 - events))
				},
				Entry("after the server has committed", true, 2),
				Entry("before the server has received the commit", false, 1),
			)
		})
	}
})
