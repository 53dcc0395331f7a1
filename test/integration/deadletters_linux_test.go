package integration_test

import (
	"os"
	"strings"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/gbytes"

	"github.com/diehard-outbox/diehard/internal/testengines"
	"github.com/diehard-outbox/diehard/test/programs"
)

var _ = Describe("Dead letters on a terminal", func() {
	var (
		dsn      string
		keyboard *os.File
		command  *programs.Process
	)

	BeforeEach(func(ctx SpecContext) {
		dsn = suite.PostgresDSN(ctx)
		insertDeadLetters(ctx, dsn, 12)
		var terminal *os.File
		keyboard, terminal = programs.Terminal()
		command = programs.RunOn(terminal, suite.Prepared(), "relay",
			[]string{"dead-letters", "discard", "--type", "thing_happened"}, deadLetterEnv(dsn)...)
		Eventually(command.Err, patience).Should(gbytes.Say(`^Discard 12 dead letters\? \[y/N\] $`))
	})

	left := func() (letters int) {
		GinkgoHelper()
		Expect(testengines.OpenPostgres(dsn, nil).Get(&letters, "SELECT count(*) FROM outbox_dead_letters")).To(Succeed())
		return letters
	}

	DescribeTable("are changed after yes",
		func(answer string) {
			_, err := keyboard.WriteString(answer + "\n")
			Expect(err).NotTo(HaveOccurred())
			command.Ended()
			Expect(string(command.Out.Contents())).To(HaveSuffix("\n12 dead letters discarded\n"))
			Expect(left()).To(BeZero())
		},
		Entry(nil, "y"), Entry(nil, "YES"),
	)

	DescribeTable("are unchanged after any other answer",
		func(answer string) {
			_, err := keyboard.WriteString(answer)
			Expect(err).NotTo(HaveOccurred())
			command.EndsWith(1)
			Expect(command.Out.Contents()).To(BeEmpty())
			Expect(string(command.Err.Contents())).To(HaveSuffix("relay: not confirmed: nothing was changed\n"))
			Expect(left()).To(Equal(12))
		},
		Entry("no", "n\n"), Entry("another word", "yesterday\n"), Entry("an empty line", "\n"), Entry("the end of the input", "\x04"),
	)

	It("are unchanged when the confirmation is interrupted", func() {
		command.Signal(syscall.SIGINT)
		command.EndsWith(1)
		Expect(string(command.Err.Contents())).To(HaveSuffix("relay: not confirmed: nothing was changed\n"))
		Expect(left()).To(Equal(12))
	})
})

var _ = Describe("Many dead letters on a terminal", func() {
	const letters = 450

	var dsn string

	BeforeEach(func(ctx SpecContext) {
		dsn = suite.PostgresDSN(ctx)
		insertDeadLetters(ctx, dsn, letters)
	})

	run := func(args ...string) *programs.Console {
		GinkgoHelper()
		return programs.RunInTerminal(suite.Prepared(), "relay", append([]string{"dead-letters"}, args...), deadLetterEnv(dsn)...)
	}

	left := func() (letters int) {
		GinkgoHelper()
		Expect(testengines.OpenPostgres(dsn, nil).Get(&letters, "SELECT count(*) FROM outbox_dead_letters")).To(Succeed())
		return letters
	}

	DescribeTable("show the progress, and then the result",
		func(command, done string) {
			console := run(command, "--all")
			Eventually(console.Screen, patience).Should(gbytes.Say(`450 dead letters\? \[y/N\] $`))
			_, err := console.Keyboard.WriteString("y\n")
			Expect(err).NotTo(HaveOccurred())
			for _, n := range []int{0, 100, 200, 300, 400, 450} {
				Eventually(console.Screen, patience).Should(gbytes.Say(`\r\x1b\[K%s %d of 450 dead letters`, done, n))
			}
			console.EndsWith(0)
			Eventually(console.Lines, patience).Should(HaveExactElements(
				HaveSuffix("450 dead letters? [y/N] y"), "450 dead letters "+done, ""))
			Expect(left()).To(BeZero())
		},
		Entry(nil, "retry", "retried"), Entry(nil, "discard", "discarded"),
	)

	It("leave only the error on the screen after a failure", func(ctx SpecContext) {
		testengines.Query(ctx, "postgres", dsn, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
			$$BEGIN IF OLD.id = 250 THEN RAISE 'the disk is full'; END IF; RETURN OLD; END$$`)
		testengines.Query(ctx, "postgres", dsn, "CREATE TRIGGER refuse BEFORE DELETE ON outbox_dead_letters FOR EACH ROW EXECUTE FUNCTION refuse()")
		console := run("discard", "--all", "--yes")
		console.EndsWith(1)
		Eventually(console.Lines, patience).Should(HaveExactElements(
			And(HavePrefix("relay: discarded 200 of 450 dead letters; run the command again for the rest: "), ContainSubstring("the disk is full")), ""))
		Expect(string(console.Screen.Contents())).To(ContainSubstring("discarded 200 of 450 dead letters, "))
		Expect(left()).To(Equal(250))
	})

	It("leave only the error on the screen after an interruption", func(ctx SpecContext) {
		blocking := testengines.OpenPostgres(dsn, nil).MustBegin()
		defer func() { _ = blocking.Rollback() }()
		blocking.MustExecContext(ctx, "SELECT FROM outbox_dead_letters WHERE id = 250 FOR UPDATE")
		console := run("discard", "--all", "--yes")
		Eventually(console.Screen, patience).Should(gbytes.Say("discarded 200 of 450 dead letters, "))
		_, err := console.Keyboard.WriteString("\x03")
		Expect(err).NotTo(HaveOccurred())
		console.EndsWith(1)
		Eventually(console.Lines, patience).Should(HaveExactElements(
			HavePrefix("relay: discarded 200 of 450 dead letters; run the command again for the rest: "), ""))
		Expect(left()).To(Equal(250))
	})

	It("are objects with --json", func() {
		console := run("discard", "--all", "--yes", "--json")
		console.EndsWith(0)
		Eventually(console.Lines, patience).Should(And(HaveLen(letters+1), HaveEach(Or(HavePrefix(`{"id":`), BeEmpty()))))
	})

	It("are lines if the output is not a terminal", func() {
		command := programs.Run(suite.Prepared(), "relay", []string{"dead-letters", "discard", "--all", "--yes"}, deadLetterEnv(dsn)...)
		command.Ended()
		Expect(strings.Split(string(command.Out.Contents()), "\n")).To(And(HaveLen(letters+2), ContainElement(HavePrefix("discarded 450  "))))
		Expect(command.Err.Contents()).To(BeEmpty())
	})
})
