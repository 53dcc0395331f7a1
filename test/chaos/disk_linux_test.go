package chaos_test

import (
	"net/http"
	"slices"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"golang.org/x/time/rate"

	"github.com/diehard-outbox/diehard/test/faultydisk"
	"github.com/diehard-outbox/diehard/test/system"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

var _ = Describe("A faulty disk", func() {
	Context("of ClickHouse:", func() {
		var (
			disk *faultydisk.Disk
			own  *system.Private
			s    *system.System
		)

		BeforeEach(func(ctx SpecContext) {
			disk = faultydisk.NewDisk()
			own = system.StartPrivate(ctx, devstack.PostgresOptions{}, devstack.ClickHouseOptions{Env: disk.Env})
			s = system.New(suite.Prepared(), own.PostgresDSN, own.ClickHouseDSNs)
		})

		It("each event arrives once when the server dies after it has stored the token and before the rows", func(ctx SpecContext) {
			relay := s.Relay(s.ClickHouse.Native, slices.Concat(small, brisk)...)
			disk.Kill(faultydisk.Rename, "tmp_insert")
			Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
			Eventually(ctx, own.ClickHouse.Done()).WithTimeout(patience).Should(BeClosed())
			disk.Repair()
			Expect(own.ClickHouse.Start(ctx)).To(Succeed())
			expectOnce(ctx, s, outcome{
				Fault: "killed between the deduplication log and the part", Done: "ClickHouse", Events: perBatch,
			})
			relay.AwaitMetric(`diehard_relay_batches_total{result="token_renewed"}`, 1) // ClickHouse had the token without the rows
		})

		It("each event arrives once when the part cannot be renamed", func(ctx SpecContext) {
			relay := s.Relay(s.ClickHouse.HTTP, slices.Concat(small, brisk)...)
			disk.Fail(faultydisk.Rename, "tmp_insert", syscall.EIO)
			Expect(s.Publish(ctx, system.Events(perBatch)...)).To(Succeed())
			awaitMessage(ctx, relay, "batch failed", "circuit breaker open")
			disk.Repair()
			expectOnce(ctx, s, outcome{Fault: "input/output error when the part is renamed", Done: "ClickHouse", Events: perBatch})
		})

		DescribeTable("each event arrives once when", func(ctx SpecContext, fault string, call faultydisk.Call, errno syscall.Errno) {
			relay := s.Relay(s.ClickHouse.Native, slices.Concat(small, brisk)...)
			stop := produce(ctx, s)
			awaitArrival(ctx, s, perBatch)
			disk.Fail(call, "/clickhouse", errno)
			awaitNotReady(ctx, relay)
			disk.Repair()
			awaitReady(ctx, relay)
			expectOnce(ctx, s, outcome{Fault: fault, Done: "ClickHouse", Events: stop()})
		},
			// The embedded engine acknowledges rows that it could not write. A real
			// server does not. Therefore the disk is full before an insert begins.
			Entry("the disk is full", "disk full", faultydisk.Space, syscall.ENOSPC),
			Entry("the disk is read-only", "read-only filesystem", faultydisk.Create, syscall.EROFS),
		)
	})

	Context("of PostgreSQL:", func() {
		DescribeTable("each event arrives once, and each user has its event, when", func(ctx SpecContext, fault, files string) {
			disk := faultydisk.NewDisk()
			own := system.StartPrivate(ctx, devstack.PostgresOptions{Env: disk.Env}, devstack.ClickHouseOptions{})
			s := system.New(suite.Prepared(), own.PostgresDSN, own.ClickHouseDSNs)
			api := s.API()
			relay := s.Relay(s.ClickHouse.Native, slices.Concat(small, brisk)...)
			users := createUsers(ctx, api, rate.Inf)
			awaitArrival(ctx, s, perBatch)
			disk.Fail(faultydisk.Write, files, syscall.ENOSPC)
			users.awaitFailure(ctx)
			disk.Repair()
			// A server that cannot write its log ends, and does not always restart.
			Eventually(ctx, func(g Gomega) {
				select {
				case <-own.Postgres.Done():
					g.Expect(own.Postgres.Start(ctx)).To(Succeed())
				default:
				}
				g.Expect(api.Ready()).To(Equal(http.StatusOK))
			}).WithTimeout(patience).Should(Succeed())
			awaitReady(ctx, relay)
			users.awaitMore(ctx, perBatch)
			users.expectEach(ctx, s, outcome{Fault: fault, Done: "PostgreSQL"})
		},
			Entry("the disk is full for tables", "disk full, tables", "/base/"),
			Entry("the disk is full for the write-ahead log", "disk full, write-ahead log", "/pg_wal/"),
		)
	})
})
