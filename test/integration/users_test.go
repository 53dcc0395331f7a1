package integration_test

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/system"
)

var _ = Describe("Creating a user", func() {
	var s *system.System

	BeforeEach(func(ctx SpecContext) { s = newSystem(ctx) })

	It("puts one user_created event with the exact payload into the outbox", func(ctx SpecContext) {
		api := s.API()
		before := time.Now()
		a, err := system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: " Ada@Example.COM ", FirstName: "Ada"})
		Expect(err).NotTo(HaveOccurred())
		Expect(a.Status).To(Equal(http.StatusCreated))
		Expect(a.Headers.Get("Location")).To(Equal(fmt.Sprint("/v1/users/", a.Body["id"])))

		var stored []struct {
			EventType       string    `db:"event_type"`
			EventDateTime   time.Time `db:"event_date_time"`
			Environment     string    `db:"environment"`
			EventContext    string    `db:"event_context"`
			MetadataVersion int64     `db:"metadata_version"`
		}
		Expect(s.Postgres.Select(&stored, `SELECT event_type, event_date_time, environment, event_context, metadata_version
			FROM outbox_events`)).To(Succeed())
		Expect(stored).To(HaveLen(1))
		Expect(stored[0].EventType).To(Equal("user_created"))
		Expect(stored[0].EventDateTime).To(BeTemporally(">=", before.Truncate(time.Microsecond)))
		Expect(stored[0].EventDateTime).To(BeTemporally("<=", time.Now()))
		Expect(stored[0].Environment).To(Equal("Test"))
		Expect(stored[0].EventContext).To(Equal(fmt.Sprintf(
			`{"user_id":%q,"email":%q,"first_name":"Ada","last_name":""}`, a.Body["id"], a.Body["email"])))
		Expect(stored[0].MetadataVersion).To(Equal(int64(1)))
		Expect(a.Body["email"]).To(BeElementOf("Ada@example.com", "ada@example.com"))
	})

	It("refuses an address that exists in different case, and publishes nothing", func(ctx SpecContext) {
		api := s.API()
		system.Create(ctx, api, system.NewUser{Email: "ada@example.com"})
		a, err := system.Post(ctx, api.URL()+"/v1/users", system.NewUser{Email: "ADA@Example.com"})
		Expect(err).NotTo(HaveOccurred())
		Expect(a.Status).To(Equal(http.StatusConflict))
		Expect(a.Headers.Get("Content-Type")).To(Equal("application/problem+json"))
		Expect(a.Body["detail"]).To(Equal("User with this email already exists"))

		published, _, _ := s.Left(Default)
		Expect(published).To(Equal(1))
	})

	It("creates one user with one event for each address, even in many concurrent requests", func(ctx SpecContext) {
		const requests, addresses, clients = 1000, 200, 50
		api, relay := s.API(), s.Relay(s.ClickHouse.Native)
		url := api.URL() + "/v1/users"
		work := make(chan int)
		statuses := make(chan int, requests)
		var group sync.WaitGroup
		for range clients {
			group.Go(func() {
				defer GinkgoRecover()
				for n := range work {
					address := fmt.Sprintf("user%d@example.com", n%addresses)
					if n%2 == 1 {
						address = strings.ToUpper(address)
					}
					a, err := system.Post(ctx, url, system.NewUser{Email: address})
					Expect(err).NotTo(HaveOccurred())
					statuses <- a.Status
				}
			})
		}
		for n := range requests {
			work <- n
		}
		close(work)
		group.Wait()
		close(statuses)

		count := map[int]int{}
		for status := range statuses {
			count[status]++
		}
		Expect(count).To(Equal(map[int]int{http.StatusCreated: addresses, http.StatusConflict: requests - addresses}))
		var users int
		Expect(s.Postgres.Get(&users, "SELECT count(*) FROM users")).To(Succeed())
		Expect(users).To(Equal(addresses))
		s.ExpectDelivered(ctx, addresses)
		var distinct int
		Expect(testengines.Scan(ctx, s.ClickHouse.HTTP,
			"SELECT uniqExact(JSONExtractString(event_context, 'user_id')) FROM event_log", &distinct)).To(Succeed())
		Expect(distinct).To(Equal(addresses))
		api.Stop()
		relay.Stop()
	})
})
