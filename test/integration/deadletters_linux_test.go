package integration_test

import (
	"os"
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
