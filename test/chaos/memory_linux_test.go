package chaos_test

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"os"
	"strconv"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

// largeEvents is the number of events. Each event takes about 12 MB of disk.
var largeEvents = func() int {
	if n, err := strconv.Atoi(os.Getenv("DIEHARD_LARGE_EVENTS")); err == nil {
		return n
	}
	return 30
}()

var _ = Describe("Large events", func() {
	const mb, mib = 1_000_000, 1 << 20

	DescribeTable("arrive once and byte for byte, through a relay with bounded memory,",
		func(ctx SpecContext, way string, maxBytes int) {
			const size = 4 * mb
			s := newSystem(ctx)
			sums := publishLarge(ctx, s, size)
			dsn := map[string]string{
				"native": s.ClickHouseDSN("native"), "native, uncompressed": s.ClickHouse.Native,
				"http": s.ClickHouseDSN("http"), "http, uncompressed": s.ClickHouse.HTTP,
			}[way]
			relay := s.Relay(dsn, fmt.Sprint("DIEHARD_RELAY_BATCH_MAX_BYTES=", maxBytes))
			for n := 0; n < largeEvents; n += 10 { // in steps, because all events together take longer than patience
				awaitArrivalOf(ctx, s, n)
			}
			expectOnce(ctx, s, outcome{
				Fault: "none", Done: fmt.Sprintf("events of 4 MB, batches of %d MiB, over %s", maxBytes/mib, way), Events: largeEvents,
			})
			Expect(sumsOf(ctx, s)).To(Equal(sums))
			peak := peakMemory(relay)
			AddReportEntry("peak memory", fmt.Sprintf("%d MB", peak/mb))
			Expect(peak).To(BeNumerically("<=", 3*max(maxBytes, size)+100*mb))
		},
		Entry("over native", "native", 32*mib),
		Entry("over http", Label("long"), "http", 32*mib),
		Entry("over native, uncompressed", Label("long"), "native, uncompressed", 32*mib),
		Entry("over http, uncompressed", Label("long"), "http, uncompressed", 32*mib),
		Entry("each larger than the limit of a batch", "native", 1*mib),
	)
})

// publishLarge publishes events with incompressible contexts: each is a
// different part of the same noise. It returns the contexts' hashes by event
// id.
func publishLarge(ctx context.Context, s *system.System, size int) map[string]string {
	GinkgoHelper()
	noise := make([]byte, base64.RawStdEncoding.DecodedLen(2*size))
	_, _ = rand.Read(noise) // never fails
	s.Postgres.MustExecContext(ctx, "CREATE TABLE noise AS SELECT $1::text AS noise", base64.RawStdEncoding.EncodeToString(noise))
	sums := make(map[string]string, largeEvents)
	for range largeEvents {
		var id, sum string
		Expect(s.Postgres.QueryRowContext(ctx, `
			INSERT INTO outbox_events (event_type, event_context)
			SELECT 'thing_happened', ('"' || substr(noise, 1 + (random() * ($1::int - 2))::int, $1::int - 2) || '"')::json FROM noise
			RETURNING event_id, encode(sha256(convert_to(event_context::text, 'UTF8')), 'hex')`, size).Scan(&id, &sum)).To(Succeed())
		sums[id] = sum
	}
	return sums
}

// sumsOf returns the hashes of the contexts in ClickHouse.
func sumsOf(ctx context.Context, s *system.System) map[string]string {
	GinkgoHelper()
	var arrived []string
	Expect(testengines.Scan(ctx, s.ClickHouse.HTTP,
		"SELECT groupArray(concat(toString(event_id), ' ', lower(hex(SHA256(event_context))))) FROM event_log", &arrived)).To(Succeed())
	sums := make(map[string]string, len(arrived))
	for _, line := range arrived {
		id, sum, _ := strings.Cut(line, " ")
		sums[id] = sum
	}
	return sums
}

// peakMemory returns the program's peak memory in bytes.
func peakMemory(p *programs.Process) int {
	GinkgoHelper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Command.Process.Pid))
	Expect(err).NotTo(HaveOccurred())
	_, rest, found := strings.Cut(string(status), "VmHWM:")
	Expect(found).To(BeTrue())
	var kib int
	_, err = fmt.Sscanf(rest, "%d kB", &kib)
	Expect(err).NotTo(HaveOccurred())
	return kib << 10
}
