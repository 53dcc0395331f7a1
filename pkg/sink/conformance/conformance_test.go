package conformance_test

import (
	"slices"
	"strings"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/sink/conformance"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	RegisterFailHandler(Fail)
	RunSpecs(t, "sink/conformance")
}

var _ = Describe("A sink that keeps its promises", func() {
	for _, c := range conformance.Cases() {
		It("passes: "+c.Name, func(ctx SpecContext) {
			Expect(c.Run(ctx, newMemory("").harness())).To(Succeed())
		})
	}
})

var _ = DescribeTable("A case finds a sink that breaks a promise:",
	func(ctx SpecContext, f fault, name, problem string) {
		cases := conformance.Cases()
		at := slices.IndexFunc(cases, func(c conformance.Case) bool { return strings.HasPrefix(c.Name, name) })
		Expect(at).NotTo(Equal(-1))
		Expect(cases[at].Run(ctx, newMemory(f).harness())).To(MatchError(ContainSubstring(problem)))
	},
	Entry("it changes a value", changesValue, "an insert stores every field", "metadata_version is"),
	Entry("it cuts a context off", cutsContext, "an insert stores contexts", "event_context differs"),
	Entry("it loses one of many types", losesType, "an insert stores 65536 types", "event_type is"),
	Entry("it stores an event once", storesOnce, "an insert stores an event once for each", "2 rows instead of 3"),
	Entry("it loses rows of concurrent inserts", losesRows, "an insert can run at the same time", "rows instead of 4000"),
	Entry("it accepts a time that it cannot store", acceptsAnyTime, "an insert names the events", "no error"),
	Entry("it accepts an empty token", acceptsMalformed, "an insert refuses an empty batch", "no error"),
	Entry("it does not classify the error of a refused row", classifiesNothing, "an insert returns a permanent error", "does not cause a permanent error, but: refused"),
	Entry("it ignores tokens", ignoresTokens, "a token prevents a second insert", "after inserts under one token: the destination does not have the expected rows"),
	Entry("it compares the rows of a token", hashesRows, "a token prevents an insert of other rows", "1 rows instead of 0"),
	Entry("it ignores tokens of inserts into many partitions", forgetsMonths, "a token covers events of more than", "rows instead of 250"),
	Entry("it has more partitions than it says", mergesPartitions, "a token that one partition has seen prevents rows of this partition (last", "rows instead of 1"),
	Entry("it forgets a token too early", forgetsTokens, "a token is remembered", "after 299 other inserts"),
	Entry("one of its servers sees no insert in flight", seesNothing, "a running insert is seen on every", "the insert has ended"),
	Entry("it sees an insert that has ended", seesForever, "a running insert is seen on every", "wait until the insert is no longer in flight"),
	Entry("it does not see rows of an aborted insert", findsNothing, "a presence check is right after an aborted insert", "does not find event 0"),
	Entry("it cannot insert again after an aborted insert", forgetsAborted, "a presence check is right after an aborted insert", "8 rows instead of 4"),
	Entry("it finds nothing", findsNothing, "a presence check finds exactly", "does not find event 0"),
	Entry("it completes only the first part of a presence check", findsFirst, "a presence check of more than twenty thousand", "does not find event"),
	Entry("it compares ids only", comparesIDs, "a presence check does not find another event", "finds event 0"),
	Entry("it finds everything", findsAll, "a presence check does not find an event that cannot be stored", "finds event 0"),
	Entry("it ignores a deadline", ignoresDeadlines, "a deadline ends an insert", "no error"),
	Entry("it ignores a deadline that has passed", ignoresDeadlines, "a deadline that has passed prevents", "no error"),
	Entry("it waits for the timer of a deadline", trustsTimers, "a deadline that has passed while", "no error"),
	Entry("its servers have different tables", hasManyTables, "every server has the same destination", "the destination of one server is"),
	Entry("it is misconfigured", lacksWindow, "every server passes the relay's own check", "window off"),
)
