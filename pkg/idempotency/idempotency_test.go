package idempotency_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/jmoiron/sqlx"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/idempotency"
	"github.com/diehard-outbox/diehard/pkg/postgres"
)

var _ = Describe("A request with an idempotency key", func() {
	var keeper *idempotency.Keeper

	BeforeEach(func() { keeper = idempotency.NewKeeper(idempotency.Options{DB: db}) })

	key := func(value, asked string) idempotency.Key {
		return idempotency.Key{Value: value, Fingerprint: sha256.Sum256([]byte(asked))}
	}

	response := func(note string) idempotency.Response {
		return idempotency.Response{Status: 201, Location: "/effects/" + note, Body: []byte("{\"note\": \"" + note + "\"}\x00\xff")}
	}

	// effect returns the work of Do: it inserts a note.
	effect := func(ctx context.Context, tx *sqlx.Tx, note string) func() (idempotency.Response, error) {
		return func() (idempotency.Response, error) {
			_, err := tx.ExecContext(ctx, "INSERT INTO effects VALUES ($1)", note)
			return response(note), err
		}
	}

	do := func(ctx context.Context, key idempotency.Key, note string) (kept idempotency.Response, replayed bool, err error) {
		err = postgres.InTx(ctx, db, func(tx *sqlx.Tx) (err error) {
			kept, replayed, err = keeper.Do(ctx, tx, key, effect(ctx, tx, note))
			return err
		})
		return kept, replayed, err
	}

	count := func(ctx context.Context, table string) (n int) {
		GinkgoHelper()
		Expect(db.GetContext(ctx, &n, "SELECT count(*) FROM "+table)).To(Succeed())
		return n
	}

	It("belongs to its client", func(ctx SpecContext) {
		of := func(client, asked string) idempotency.Key {
			k := key("k", asked)
			k.Client = client
			return k
		}
		for _, client := range []string{"a", "b", ""} {
			kept, replayed, err := do(ctx, of(client, client), "of "+client)
			Expect(err).NotTo(HaveOccurred())
			Expect(replayed).To(BeFalse())
			Expect(kept).To(Equal(response("of " + client)))
		}
		kept, found, err := keeper.Find(ctx, of("b", "b"))
		Expect(err).NotTo(HaveOccurred())
		Expect(found).To(BeTrue())
		Expect(kept).To(Equal(response("of b")))
		_, _, err = keeper.Find(ctx, of("b", "a"))
		Expect(err).To(MatchError(idempotency.ErrMismatch))
		_, found, err = keeper.Find(ctx, of("c", "a"))
		Expect(err).NotTo(HaveOccurred())
		Expect(found).To(BeFalse())

		By("holding the key of one client")
		err = postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
			_, _, err := keeper.Do(ctx, tx, of("x", "a"), func() (idempotency.Response, error) {
				_, _, err := do(ctx, of("y", "a"), "of y")
				Expect(err).NotTo(HaveOccurred())
				_, _, err = do(ctx, of("x", "a"), "of x")
				Expect(err).To(MatchError(idempotency.ErrInProgress))
				return effect(ctx, tx, "of x")()
			})
			return err
		})
		Expect(err).NotTo(HaveOccurred())
	})

	It("takes effect once and replays the first response", func(ctx SpecContext) {
		first, replayed, err := do(ctx, key("k", "a"), "one")
		Expect(err).NotTo(HaveOccurred())
		Expect(replayed).To(BeFalse())
		Expect(first).To(Equal(response("one")))

		again, replayed, err := do(ctx, key("k", "a"), "two")
		Expect(err).NotTo(HaveOccurred())
		Expect(replayed).To(BeTrue())
		Expect(again).To(Equal(response("one")))
		Expect(count(ctx, "effects")).To(Equal(1))
	})

	It("is independent of other keys", func(ctx SpecContext) {
		for _, name := range []string{"k", "K", "k ", strings.Repeat("k", idempotency.MaxKeyBytes)} {
			_, replayed, err := do(ctx, key(name, "a"), name)
			Expect(err).NotTo(HaveOccurred())
			Expect(replayed).To(BeFalse())
		}
		Expect(count(ctx, "effects")).To(Equal(4))
	})

	It("is refused if the key was used for a different request", func(ctx SpecContext) {
		_, _, err := do(ctx, key("k", "a"), "one")
		Expect(err).NotTo(HaveOccurred())
		_, _, err = do(ctx, key("k", "b"), "two")
		Expect(err).To(MatchError(idempotency.ErrMismatch))
		Expect(count(ctx, "effects")).To(Equal(1))
	})

	It("stores no key if the work fails", func(ctx SpecContext) {
		refused := errors.New("refused")
		err := postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
			_, _, err := keeper.Do(ctx, tx, key("k", "a"), func() (idempotency.Response, error) {
				_, _ = effect(ctx, tx, "one")()
				return idempotency.Response{}, refused
			})
			return err
		})
		Expect(err).To(MatchError(refused))
		Expect(count(ctx, "effects") + count(ctx, "idempotency_keys")).To(BeZero())
		_, replayed, err := do(ctx, key("k", "b"), "two")
		Expect(err).NotTo(HaveOccurred())
		Expect(replayed).To(BeFalse())
	})

	It("is refused while a request with the same key is in progress, and later replays the response of that request", func(ctx SpecContext) {
		tx, err := db.BeginTxx(ctx, nil)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { _ = tx.Rollback() })
		_, _, err = keeper.Do(ctx, tx, key("k", "a"), effect(ctx, tx, "one"))
		Expect(err).NotTo(HaveOccurred())
		_, _, err = do(ctx, key("k", "a"), "two")
		Expect(err).To(MatchError(idempotency.ErrInProgress))
		Expect(tx.Commit()).To(Succeed())
		again, replayed, err := do(ctx, key("k", "a"), "two")
		Expect(err).NotTo(HaveOccurred())
		Expect(replayed).To(BeTrue())
		Expect(again).To(Equal(response("one")))
	})

	It("succeeds at once after another request with the same key died before its commit", func(ctx SpecContext) {
		tx, err := db.BeginTxx(ctx, nil)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(func() { _ = tx.Rollback() })
		_, _, err = keeper.Do(ctx, tx, key("k", "a"), effect(ctx, tx, "one"))
		Expect(err).NotTo(HaveOccurred())
		var pid int
		Expect(tx.GetContext(ctx, &pid, "SELECT pg_backend_pid()")).To(Succeed())
		db.MustExecContext(ctx, "SELECT pg_terminate_backend($1)", pid)
		Eventually(ctx, func() (bool, error) {
			_, replayed, err := do(ctx, key("k", "a"), "two")
			return replayed, err
		}).Should(BeFalse())
		Expect(count(ctx, "effects")).To(Equal(1))
	})

	It("has no effect if a writer without the lock has stored a response", func(ctx SpecContext) {
		err := postgres.InTx(ctx, db, func(tx *sqlx.Tx) error {
			_, _, err := keeper.Do(ctx, tx, key("k", "a"), func() (idempotency.Response, error) {
				db.MustExecContext(ctx, `INSERT INTO idempotency_keys (client, key, fingerprint, status, location, etag, body, expires_at)
					VALUES ('', 'k', sha256('a'), 201, '/effects/other', '', '{}', clock_timestamp() + interval '1 hour')`)
				return effect(ctx, tx, "one")()
			})
			return err
		})
		Expect(err).To(MatchError(idempotency.ErrInProgress))
		Expect(count(ctx, "effects")).To(BeZero())
		kept, replayed, err := do(ctx, key("k", "a"), "two")
		Expect(err).NotTo(HaveOccurred())
		Expect(replayed).To(BeTrue())
		Expect(kept.Location).To(Equal("/effects/other"))
	})

	It("takes effect once under concurrent requests", func(ctx SpecContext) {
		var group sync.WaitGroup
		outcomes := make(chan error, 200)
		for i := range cap(outcomes) {
			group.Go(func() {
				for {
					kept, _, err := do(ctx, key(fmt.Sprint("k", i%5), "a"), fmt.Sprint(i%5))
					if errors.Is(err, idempotency.ErrInProgress) {
						continue
					}
					if err == nil && !bytes.Equal(kept.Body, response(fmt.Sprint(i%5)).Body) {
						err = fmt.Errorf("response of another key: %q", kept.Body)
					}
					outcomes <- err
					return
				}
			})
		}
		group.Wait()
		close(outcomes)
		for err := range outcomes {
			Expect(err).NotTo(HaveOccurred())
		}
		Expect(count(ctx, "effects")).To(Equal(5))
	})

	Describe("with an expired response", func() {
		BeforeEach(func(ctx SpecContext) {
			_, _, err := do(ctx, key("k", "a"), "one")
			Expect(err).NotTo(HaveOccurred())
			db.MustExecContext(ctx, "UPDATE idempotency_keys SET expires_at = clock_timestamp()")
		})

		It("counts as a new request, even with a different fingerprint", func(ctx SpecContext) {
			for _, want := range []bool{false, true} {
				kept, replayed, err := do(ctx, key("k", "b"), "two")
				Expect(err).NotTo(HaveOccurred())
				Expect(replayed).To(Equal(want))
				Expect(kept).To(Equal(response("two")))
			}
		})

		It("has its response deleted, and other responses are kept", func(ctx SpecContext) {
			db.MustExecContext(ctx, `INSERT INTO idempotency_keys
				SELECT '', 'old ' || n, '', 201, '', '', '', clock_timestamp() FROM generate_series(1, 2500) n`)
			_, _, err := do(ctx, key("young", "a"), "two")
			Expect(err).NotTo(HaveOccurred())
			running, stop := context.WithTimeout(ctx, time.Minute)
			defer stop()
			ended := make(chan error, 1)
			go func() { ended <- keeper.Run(running) }()
			Eventually(ctx, count).WithArguments(ctx, "idempotency_keys").Should(Equal(1))
			stop()
			Eventually(ctx, ended).Should(Receive(BeNil()))
			_, replayed, err := do(ctx, key("young", "a"), "three")
			Expect(err).NotTo(HaveOccurred())
			Expect(replayed).To(BeTrue())
		})
	})

	It("has its response kept for the configured time", func(ctx SpecContext) {
		keeper = idempotency.NewKeeper(idempotency.Options{DB: db, TTL: 3 * time.Hour})
		_, _, err := do(ctx, key("k", "a"), "one")
		Expect(err).NotTo(HaveOccurred())
		var seconds float64
		Expect(db.GetContext(ctx, &seconds, "SELECT extract(epoch FROM expires_at - clock_timestamp()) FROM idempotency_keys")).To(Succeed())
		Expect(seconds).To(BeNumerically("~", 3*3600, 600))
	})
})
