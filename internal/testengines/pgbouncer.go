package testengines

import (
	"context"
	"net/url"
	"strconv"
	"strings"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/needs"
)

// StartPgBouncer starts a PgBouncer in transaction mode in front of the server of dsn. It
// returns dsn through the pooler, which ends with the spec. The pooler has poolSize
// connections to the database. Without a PgBouncer, it skips the spec.
func StartPgBouncer(ctx context.Context, dsn string, poolSize int) (through string) {
	GinkgoHelper()
	p := &process{args: []string{"pgbouncer", "--target", dsn, "--pool-size", strconv.Itoa(poolSize)}}
	if err := p.start(ctx); err != nil {
		if ctx.Err() == nil && (strings.Contains(err.Error(), "download PgBouncer with apt") || strings.Contains(err.Error(), "no PgBouncer was found")) {
			needs.LeaveOut(err.Error())
		}
		Expect(err).NotTo(HaveOccurred())
	}
	DeferCleanup(func() { Expect(p.end(syscall.SIGTERM)).To(Succeed()) })
	target, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	pooler, err := url.Parse(p.addresses["dsn"])
	Expect(err).NotTo(HaveOccurred())
	target.Host = pooler.Host
	return target.String()
}
