package httpapi_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
)

var _ = Describe("Requests for new users with idempotency keys", func() {
	body := func(email string) string { return fmt.Sprintf(`{"email":%q}`, email) }

	// together makes n requests at the same time, and returns the responses in order.
	together := func(n int, ask func(i int) response) []response {
		responses := make([]response, n)
		var group sync.WaitGroup
		for i := range n {
			group.Go(func() {
				defer GinkgoRecover()
				responses[i] = ask(i)
			})
		}
		group.Wait()
		return responses
	}

	It("share transactions, and each key stores its own response", func(ctx SpecContext) {
		const n = 90 // below MaxConcurrent
		api := start(ctx)
		ask := func(i int) response {
			return api.create(ctx, body(fmt.Sprintf("user-%d@example.com", i)), fmt.Sprintf("Idempotency-Key: %d", i))
		}
		created, repeated := together(n, ask), together(n, ask)
		for i := range n {
			Expect(created[i].status).To(Equal(http.StatusCreated))
			Expect(created[i].body).To(ContainSubstring(fmt.Sprintf("user-%d@", i)))
			Expect(repeated[i].status).To(Equal(http.StatusCreated))
			Expect(repeated[i].header.Get("Idempotency-Replayed")).To(Equal("true"))
			Expect(repeated[i].body).To(Equal(created[i].body))
			for _, name := range []string{"Location", "ETag"} {
				Expect(repeated[i].header.Get(name)).To(And(Not(BeEmpty()), Equal(created[i].header.Get(name))))
			}
		}
		Expect(count(ctx, "users")).To(Equal(n))
		Expect(count(ctx, "outbox_events")).To(Equal(n))
		Expect(count(ctx, "idempotency_keys")).To(Equal(n))
		Expect(count(ctx, "(SELECT DISTINCT xmin::text FROM users)")).To(BeNumerically("<", n))
	})

	It("take effect once for each key, whichever of two servers they reach", func(ctx SpecContext) {
		const keys, requests = 20, 160
		apis := []*api{start(ctx), start(ctx)}
		seed := GinkgoRandomSeed()
		random := rand.New(rand.NewPCG(uint64(seed), 0)) //nolint:gosec // only the order
		order := random.Perm(requests)
		responses := together(requests, func(i int) response {
			key := order[i] % keys
			email := fmt.Sprintf("user-%d@example.com", key)
			if order[i] >= requests-keys { // the same key with another address
				email = "other-" + email
			}
			return apis[i%len(apis)].create(ctx, body(email), fmt.Sprintf("Idempotency-Key: %d", key))
		})
		bodies := map[int]map[string]bool{}
		for i, r := range responses {
			Expect(r.status).To(BeElementOf(http.StatusCreated, http.StatusConflict, http.StatusUnprocessableEntity), r.body)
			if r.status == http.StatusConflict {
				Expect(r.body).To(ContainSubstring("idempotency-key-in-use"))
			}
			if r.status == http.StatusCreated {
				key := order[i] % keys
				if bodies[key] == nil {
					bodies[key] = map[string]bool{}
				}
				bodies[key][r.body] = true
			}
		}
		Expect(bodies).To(HaveLen(keys))
		Expect(bodies).To(HaveEach(HaveLen(1)))
		Expect(count(ctx, "users")).To(Equal(keys))
		Expect(count(ctx, "outbox_events")).To(Equal(keys))
		Expect(count(ctx, "idempotency_keys")).To(Equal(keys))
	})

	It("succeed although a request in their group reuses a key", func(ctx SpecContext) {
		const n = 60
		api := start(ctx)
		Expect(api.create(ctx, body("ada@example.com"), "Idempotency-Key: used").status).To(Equal(http.StatusCreated))
		for _, r := range together(n, func(i int) response {
			email, key := fmt.Sprintf("user-%d@example.com", i), fmt.Sprint(i)
			if i%20 == 0 {
				key = "used"
			}
			r := api.create(ctx, body(email), "Idempotency-Key: "+key)
			if key == "used" && r.status != http.StatusConflict { // another one with this key is in progress
				expectProblem(r, http.StatusUnprocessableEntity, "idempotency-key-reused")
				r.status = http.StatusConflict
			}
			return r
		}) {
			Expect(r.status).To(BeElementOf(http.StatusCreated, http.StatusConflict))
		}
		Expect(count(ctx, "users")).To(Equal(1 + n - n/20))
		Expect(count(ctx, "outbox_events")).To(Equal(1 + n - n/20))
		Expect(count(ctx, "idempotency_keys")).To(Equal(1 + n - n/20))
	})

	It("make a group fail only once if a client reuses a key again and again", func(ctx SpecContext) {
		own := testengines.OpenPostgres(suite.PostgresDSN(ctx), nil)
		own.MustExecContext(ctx, "CREATE SEQUENCE inserts")
		own.MustExecContext(ctx, "CREATE FUNCTION count_insert() RETURNS trigger LANGUAGE plpgsql AS "+
			"$$ BEGIN PERFORM nextval('inserts'); RETURN NEW; END $$")
		own.MustExecContext(ctx, "CREATE TRIGGER count_insert BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION count_insert()")
		api := start(ctx, onDatabase(own))
		Expect(api.create(ctx, body("ada@example.com"), "Idempotency-Key: used").status).To(Equal(http.StatusCreated))
		for i := range 10 {
			reused := api.create(ctx, body(fmt.Sprintf("user-%d@example.com", i)), "Idempotency-Key: used")
			expectProblem(reused, http.StatusUnprocessableEntity, "idempotency-key-reused")
		}
		Expect(api.create(ctx, body("bob@example.com")).status).To(Equal(http.StatusCreated))
		var inserts int // of two users, and of the group that failed
		Expect(own.GetContext(ctx, &inserts, "SELECT last_value FROM inserts")).To(Succeed())
		Expect(inserts).To(Equal(3))
	})

	It("do not store a response if the address is taken", func(ctx SpecContext) {
		api := start(ctx)
		Expect(api.create(ctx, body("ada@example.com")).status).To(Equal(http.StatusCreated))
		expectProblem(api.create(ctx, body("Ada@example.com"), "Idempotency-Key: a"), http.StatusConflict, "email-taken")
		Expect(count(ctx, "idempotency_keys")).To(BeZero())
		Expect(api.create(ctx, body("bob@example.com"), "Idempotency-Key: a").status).To(Equal(http.StatusCreated))
	})

	It("replace a response that has expired", func(ctx SpecContext) {
		api := start(ctx)
		Expect(api.create(ctx, body("ada@example.com"), "Idempotency-Key: a").status).To(Equal(http.StatusCreated))
		db.MustExecContext(ctx, "UPDATE idempotency_keys SET expires_at = clock_timestamp()")
		created := api.create(ctx, body("bob@example.com"), "Idempotency-Key: a")
		Expect(created.status).To(Equal(http.StatusCreated))
		Expect(created.body).To(ContainSubstring("bob"))
		Expect(api.create(ctx, body("bob@example.com"), "Idempotency-Key: a").body).To(Equal(created.body))
	})

	It("change nothing while another transaction holds the key", func(ctx SpecContext) {
		api := start(ctx)
		holder := db.MustBegin()
		DeferCleanup(func() { _ = holder.Rollback() })
		holder.MustExec("SELECT pg_advisory_xact_lock(hashtextextended('diehard idempotency key  a', 0))")
		for _, r := range together(10, func(i int) response {
			return api.create(ctx, body(fmt.Sprintf("user-%d@example.com", i)), "Idempotency-Key: "+strings.Repeat("b", i)+"a")
		})[1:] {
			Expect(r.status).To(Equal(http.StatusCreated))
		}
		expectProblem(api.create(ctx, body("ada@example.com"), "Idempotency-Key: a"), http.StatusConflict, "idempotency-key-in-use")
		Expect(count(ctx, "users")).To(Equal(9))
		Expect(holder.Rollback()).To(Succeed())
		Expect(api.create(ctx, body("ada@example.com"), "Idempotency-Key: a").status).To(Equal(http.StatusCreated))
	})
})
