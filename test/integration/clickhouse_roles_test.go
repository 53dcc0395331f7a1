package integration_test

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/pkg/outbox"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

// rights are rights like SELECT and the objects that they are for.
type rights map[string]bool

func (r rights) add(right, object string) { r[right+" ON "+object] = true }

func (r rights) sorted() []string { return slices.Sorted(maps.Keys(r)) }

var (
	grants     = regexp.MustCompile(`(?m)^GRANT (.+) ON (\S+) TO (\w+);$`)
	operations = regexp.MustCompile(`(?i)\b(INSERT INTO|CREATE TABLE(?: IF NOT EXISTS)?|DROP TABLE(?: IF EXISTS)?|ALTER TABLE|FROM)\s+([\w.` + "`" + `]+)`)
	scratch    = regexp.MustCompile(`_check_[a-z0-9]{8}.*`)
)

// needed returns the rights that the statements need. The engine of the tests has no users,
// so it enforces no rights.
func needed(statements []string, database string) rights {
	found := rights{}
	for _, statement := range statements {
		if rest, isList := strings.CutPrefix(statement, "SELECT groupArray("); isList && !strings.Contains(rest, "FROM system.") && !strings.Contains(rest, "event_log") {
			continue // it calculates
		}
		for _, m := range operations.FindAllStringSubmatch(statement, -1) {
			object := strings.TrimPrefix(strings.ReplaceAll(m[2], "`", ""), database+".")
			object = scratch.ReplaceAllString(object, "_check_*")
			right := strings.ToUpper(m[1])
			for _, noise := range []string{" INTO", " IF NOT EXISTS", " IF EXISTS"} {
				right = strings.TrimSuffix(right, noise)
			}
			if right == "FROM" {
				right = "SELECT"
			}
			found.add(right, object)
		}
	}
	return found
}

var _ = Describe("The roles of deploy/clickhouse/roles.sql", func() {
	It("have the rights of the statements that the programs send, and no others", func(ctx SpecContext) {
		source, err := os.ReadFile("../../deploy/clickhouse/roles.sql")
		Expect(err).NotTo(HaveOccurred())
		granted := map[string]rights{}
		for _, m := range grants.FindAllStringSubmatch(string(source), -1) {
			if granted[m[3]] == nil {
				granted[m[3]] = rights{}
			}
			for right := range strings.SplitSeq(m[1], ", ") {
				granted[m[3]].add(right, m[2])
			}
		}
		s := system.New(suite.Prepared(), suite.EmptyPostgresDSN(ctx), suite.EmptyClickHouseDSNs(ctx))
		var database string
		Expect(testengines.Scan(ctx, s.ClickHouse.HTTP, "SELECT currentDatabase()", &database)).To(Succeed())
		// recorded returns the statements that do sends.
		recorded := func(do func(dsn string)) rights {
			GinkgoHelper()
			gateway, through := faults.StartGatewayTo(s.ClickHouse.HTTP)
			do(through)
			statements := gateway.Statements()
			Expect(statements).NotTo(BeEmpty())
			return needed(statements, database)
		}
		run := func(dsn string, args ...string) {
			GinkgoHelper()
			programs.Run(suite.Prepared(), "relay", args, "DIEHARD_POSTGRES_DSN="+s.PostgresDSN, "DIEHARD_CLICKHOUSE_DSN="+dsn).EndsWith(0)
		}
		Expect(recorded(func(dsn string) {
			run(dsn, "migrate")
			run(dsn, "migrate")
		}).sorted()).To(Equal(granted["diehard_migrations"].sorted()))

		relay := recorded(func(dsn string) {
			// The relay reads the default of a setting that the table does not have.
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log RESET SETTING old_parts_lifetime")
			run(dsn, "check")
			testengines.Query(ctx, "clickhouse", s.ClickHouse.HTTP, "ALTER TABLE event_log ADD CONSTRAINT no_refunds CHECK event_type != 'refund_requested'")
			s.Relay(dsn)
			Expect(s.Publish(ctx, append(system.Events(4), system.Event(outbox.WithType("refund_requested")))...)).To(Succeed())
			Eventually(func(g Gomega) int { _, _, dead := s.Left(g); return dead }).WithTimeout(patience).Should(Equal(1))
		})
		// A table of the replicated engine cannot be here. For such a table, the relay also
		// reads these.
		for _, object := range []string{"system.replicas", "system.replicated_merge_tree_settings"} {
			Expect(relay).NotTo(HaveKey("SELECT ON " + object))
			relay.add("SELECT", object)
		}
		Expect(relay.sorted()).To(Equal(granted["diehard_relay"].sorted()))

		deep := recorded(func(dsn string) { run(dsn, "check", "--deep") })
		maps.DeleteFunc(deep, func(right string, _ bool) bool { return granted["diehard_relay"][right] })
		Expect(deep.sorted()).To(Equal(granted["diehard_check"].sorted()))
	})
})
