package chaos_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
)

// previousCommit is the version before this one: the commit before the work on deployments.
// Its programs need the second version of the schema.
const previousCommit = "8ae15518860985f25e70d2621e71d84b9119300f"

// buildPrevious builds the programs of the previous version and returns their folder. It
// skips the spec if the repository has no history.
func buildPrevious(ctx context.Context) string {
	GinkgoHelper()
	repository, err := testengines.Repository()
	Expect(err).NotTo(HaveOccurred())
	git := func(args ...string) *exec.Cmd {
		return exec.CommandContext(ctx, "git", append([]string{"-C", repository}, args...)...) //nolint:gosec // our own arguments
	}
	if output, err := git("cat-file", "-e", previousCommit).CombinedOutput(); err != nil {
		Skip("the commit of the previous version is missing, for example in a shallow clone: " + string(output))
	}
	source, dir := GinkgoT().TempDir(), GinkgoT().TempDir()
	archive := filepath.Join(dir, "source.tar")
	output, err := git("archive", "--output="+archive, previousCommit).CombinedOutput()
	Expect(err).NotTo(HaveOccurred(), "%s", output)
	output, err = exec.CommandContext(ctx, "tar", "-xf", archive, "-C", source).CombinedOutput() //nolint:gosec // our own file
	Expect(err).NotTo(HaveOccurred(), "%s", output)
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", dir+string(os.PathSeparator), "./cmd/api", "./cmd/relay") //nolint:gosec // our own folder
	build.Dir, build.Env = source, append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	output, err = build.CombinedOutput()
	Expect(err).NotTo(HaveOccurred(), "%s", output)
	return dir
}

var _ = Describe("An upgrade under load, and its rollback", Label("long"), func() {
	It("loses and doubles no event, with both versions side by side", func(ctx SpecContext) {
		const relays = 2
		programsBefore := buildPrevious(ctx)
		previous := system.New(programsBefore, suite.EmptyPostgresDSN(ctx), suite.EmptyClickHouseDSNs(ctx))
		next := system.New(suite.Prepared(), previous.PostgresDSN, previous.ClickHouse)
		migrate := func(dir string) {
			GinkgoHelper()
			for _, program := range []string{"relay", "api"} {
				programs.Run(dir, program, []string{"migrate"}, "DIEHARD_POSTGRES_DSN="+next.PostgresDSN, "DIEHARD_CLICKHOUSE_DSN="+next.ClickHouse.Native).Ended()
			}
		}
		version := func() (v int) {
			GinkgoHelper()
			Expect(next.Postgres.GetContext(ctx, &v, "SELECT max(version_id) FROM diehard_outbox_version")).To(Succeed())
			return v
		}
		var all []*clients
		// start starts an API with clients, and relays.
		start := func(s *system.System) (stop func()) {
			GinkgoHelper()
			api := s.API(brisk...)
			load := createUsers(ctx, api, 200)
			all = append(all, load)
			running := []*programs.Process{api}
			for range relays {
				running = append(running, s.Relay(s.ClickHouse.Native, brisk...))
			}
			load.awaitMore(ctx, 200)
			return func() {
				GinkgoHelper()
				load.awaitMore(ctx, 200)
				load.stop()
				_, failed := load.counts()
				Expect(failed).To(BeZero(), "%v", load.responses)
				for _, p := range running {
					p.Stop()
				}
			}
		}
		migrate(programsBefore)
		testengines.Query(ctx, "clickhouse", next.ClickHouse.HTTP, "SYSTEM STOP MERGES event_log")
		before := version()
		// A change of history gets another incarnation.
		incarnation := func() (id string) {
			GinkgoHelper()
			Expect(next.Postgres.GetContext(ctx, &id, "SELECT incarnation FROM outbox_history")).To(Succeed())
			return id
		}
		first := incarnation()
		stopPrevious := start(previous)

		By("migrating while the previous version runs")
		migrate(suite.Prepared())
		Expect(version()).To(BeNumerically(">", before), "this version has a migration of its own")
		all[0].awaitMore(ctx, 200)

		By("running both versions")
		stopNext := start(next)
		stopPrevious()
		all[1].awaitMore(ctx, 200)

		By("rolling back the programs, and leaving the schema as it is")
		stopPrevious = start(previous)
		stopNext()

		By("upgrading again")
		stopNext = start(next)
		stopPrevious()
		stopNext()

		next.Relay(next.ClickHouse.Native, brisk...)
		next.AwaitEmpty(ctx)
		Expect(incarnation()).To(Equal(first), "an upgrade is no change of history")
		acknowledged := 0
		for _, load := range all {
			created, _ := load.counts()
			acknowledged += created
		}
		var users int
		Expect(next.Postgres.GetContext(ctx, &users, "SELECT count(*) FROM users")).To(Succeed())
		Expect(users).To(BeNumerically(">=", acknowledged))
		next.ExpectDelivered(ctx, users)
	})
})
