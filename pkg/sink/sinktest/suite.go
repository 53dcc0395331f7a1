// Package sinktest is the conformance suite of sink.Sink. Every sink passes it on a real
// server.
package sinktest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/pkg/sink"
)

// Destination is a sink's destination for one spec. It is new and empty, and no other
// spec uses it. It keeps duplicates: merges are stopped while the spec runs.
type Destination struct {
	// Addr is the host and port of the sink's server.
	Addr string
	// Open opens a sink on the destination. addr is Addr, or the address of a proxy in
	// front of the server.
	Open func(addr string) (sink.Sink, error)
	// Stored reads every row, including duplicates, in any order. It does not use the
	// sink.
	Stored func(ctx context.Context) (*sink.Events, error)
	// Slow makes every later insert take at least d on the server.
	Slow func(ctx context.Context, d time.Duration) error
	// Refuse makes the server refuse later rows of the event type because of their data.
	Refuse func(ctx context.Context, eventType string) error
	// Hide opens a sink from which the destination hides the rows of the event type, as a
	// row policy does. The sink's own settings cannot prevent this.
	Hide func(eventType string) (sink.Sink, error)
	// Spoil removes a property of the destination that the sink's promises need.
	Spoil func(ctx context.Context) error
}

const (
	patience = 30 * time.Second
	polling  = 20 * time.Millisecond
)

// Describe adds the suite's specs under the text. Each spec begins with a call of
// arrange, which may use DeferCleanup.
func Describe(text string, arrange func(ctx context.Context) Destination) bool {
	return ginkgo.Describe(text, func() {
		var (
			d Destination
			s sink.Sink
		)
		open := func(addr string) sink.Sink {
			ginkgo.GinkgoHelper()
			opened, err := d.Open(addr)
			Expect(err).NotTo(HaveOccurred())
			ginkgo.DeferCleanup(opened.Close)
			return opened
		}
		stored := func(ctx context.Context) (*sink.Events, error) {
			events, err := d.Stored(ctx)
			if err != nil {
				return nil, err
			}
			return sorted(events), nil
		}
		count := func(ctx context.Context) (int, error) {
			events, err := d.Stored(ctx)
			if err != nil {
				return 0, err
			}
			return events.Len(), nil
		}
		ginkgo.BeforeEach(func(ctx ginkgo.SpecContext) {
			d = arrange(ctx)
			s = open(d.Addr)
		})

		ginkgo.Describe("an insert", func() {
			ginkgo.It("stores every field of every event unchanged", func(ctx ginkgo.SpecContext) {
				events := oddities()
				Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: copied(events)})).To(Succeed())
				Expect(stored(ctx)).To(equalEvents(sorted(events)))
			})

			ginkgo.It("stores contexts of several megabytes byte for byte", func(ctx ginkgo.SpecContext) {
				events := withContexts(3, 5<<20)
				Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: copied(events)})).To(Succeed())
				Expect(stored(ctx)).To(equalEvents(sorted(events)))
			})

			// The wire format stores indexes of values in one or two bytes. The numbers
			// are at the limits of both sizes, with and without the empty string.
			for _, n := range []int{255, 256, 65_535, 65_536} {
				ginkgo.It(fmt.Sprintf("stores %d types and environments", n), func(ctx ginkgo.SpecContext) {
					events := &sink.Events{}
					for i := range n {
						add(events, fmt.Sprint("type_", i), time.Unix(0, 0), fmt.Sprint("environment ", i), "{}", 1)
					}
					Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: copied(events)})).To(Succeed())
					Expect(stored(ctx)).To(equalEvents(sorted(events)))
				})
			}

			ginkgo.It("stores an event once for each occurrence in the batch", func(ctx ginkgo.SpecContext) {
				events := some(2)
				appendFrom(events, events, 1)
				Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: copied(events)})).To(Succeed())
				Expect(count(ctx)).To(Equal(3))
			})

			ginkgo.It("adds nothing under a token that was seen before", func(ctx ginkgo.SpecContext) {
				events, seen := some(100), token()
				for range 3 {
					Expect(s.Insert(ctx, sink.Batch{Token: seen, Events: copied(events)})).To(Succeed())
				}
				Expect(open(d.Addr).Insert(ctx, sink.Batch{Token: seen, Events: copied(events)})).To(Succeed())
				Expect(count(ctx)).To(Equal(100))

				ginkgo.By("inserting the events under another token")
				Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: copied(events)})).To(Succeed())
				Expect(count(ctx)).To(Equal(200))
			})

			ginkgo.It("deduplicates events of more than a hundred months under one token", func(ctx ginkgo.SpecContext) {
				events, seen := some(250), token()
				for i := range events.EventDateTime {
					events.EventDateTime[i] = time.Date(2000, time.Month(1+i%125), 1+i%28, 0, 0, 0, 0, time.UTC).UnixMicro()
				}
				for range 2 {
					Expect(s.Insert(ctx, sink.Batch{Token: seen, Events: copied(events)})).To(Succeed())
				}
				Expect(stored(ctx)).To(equalEvents(sorted(events)))
			})

			ginkgo.It("can run at the same time as other inserts", func(ctx ginkgo.SpecContext) {
				const inserts, size = 8, 500
				var group sync.WaitGroup
				for range inserts {
					group.Go(func() {
						defer ginkgo.GinkgoRecover()
						Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: some(size)})).To(Succeed())
					})
				}
				group.Wait()
				Expect(count(ctx)).To(Equal(inserts * size))
			})

			ginkgo.It("names the events that cannot be stored, and sends no row of the batch", func(ctx ginkgo.SpecContext) {
				events, unsent := some(10), token()
				events.EventDateTime[3] = time.Date(0, 12, 31, 23, 59, 59, 999_999_000, time.UTC).UnixMicro()
				events.EventDateTime[7] = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro()
				events.EventDateTime[9] = math.MinInt64

				err := s.Insert(ctx, sink.Batch{Token: unsent, Events: copied(events)})
				Expect(sink.ClassOf(err)).To(Equal(sink.Permanent))
				bad, ok := errors.AsType[*sink.BadEventsError](err)
				Expect(ok).To(BeTrue(), "a *sink.BadEventsError: %v", err)
				Expect(bad.Events).To(HaveLen(3))
				for i, index := range []int{3, 7, 9} {
					Expect(bad.Events[i].Index).To(Equal(index))
					Expect(bad.Events[i].Err).To(HaveOccurred())
				}
				Expect(count(ctx)).To(BeZero())

				ginkgo.By("inserting other rows under the same token, which the sink does not know yet")
				Expect(s.Insert(ctx, sink.Batch{Token: unsent, Events: some(7)})).To(Succeed())
				Expect(count(ctx)).To(Equal(7))
			})

			ginkgo.It("refuses an empty batch, an empty token and columns of different lengths", func(ctx ginkgo.SpecContext) {
				shortened := func(shorten func(e *sink.Events)) sink.Batch {
					events := some(5)
					shorten(events)
					return sink.Batch{Token: token(), Events: events}
				}
				for _, batch := range []sink.Batch{
					{Token: token(), Events: &sink.Events{}},
					{Token: "", Events: some(5)},
					shortened(func(e *sink.Events) { e.EventID = e.EventID[:4] }),
					shortened(func(e *sink.Events) { e.EventType.Indexes = e.EventType.Indexes[:4] }),
					shortened(func(e *sink.Events) { e.EventDateTime = e.EventDateTime[:4] }),
					shortened(func(e *sink.Events) { e.Environment.Indexes = e.Environment.Indexes[:4] }),
					shortened(func(e *sink.Events) { e.EventContext.Ends = e.EventContext.Ends[:4] }),
					shortened(func(e *sink.Events) { e.MetadataVersion = e.MetadataVersion[:4] }),
				} {
					err := s.Insert(ctx, batch)
					Expect(err).To(HaveOccurred())
					Expect(sink.ClassOf(err)).NotTo(Equal(sink.Permanent))
				}
				Expect(count(ctx)).To(BeZero())
			})

			ginkgo.It("returns a permanent error if the server refuses a row because of its data", func(ctx ginkgo.SpecContext) {
				Expect(d.Refuse(ctx, "unwanted")).To(Succeed())
				events, others := some(17), some(32)
				add(events, "unwanted", time.Unix(0, 0), "Test", `{"email":"ada@example.com"}`, 1)
				for i := range others.Len() {
					appendFrom(events, others, i)
				}
				err := s.Insert(ctx, sink.Batch{Token: token(), Events: copied(events)})
				Expect(sink.ClassOf(err)).To(Equal(sink.Permanent), "%v", err)
				Expect(err.Error()).NotTo(ContainSubstring("example.com"), "an error must not quote an event")
				Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: some(50)})).To(Succeed())
			})
		})

		ginkgo.Describe("InFlight", func() {
			ginkgo.It("sees an insert only while it is executed", func(ctx ginkgo.SpecContext) {
				Expect(d.Slow(ctx, 2*time.Second)).To(Succeed())
				slow := token()
				Expect(s.InFlight(ctx, slow)).To(BeFalse())

				done, other := make(chan error, 1), open(d.Addr)
				go func() { done <- s.Insert(ctx, sink.Batch{Token: slow, Events: some(1)}) }()
				Eventually(ctx, other.InFlight, patience, polling).WithArguments(slow).Should(BeTrue())
				Expect(other.InFlight(ctx, token())).To(BeFalse())
				Eventually(ctx, done, patience, polling).Should(Receive(BeNil()))
				// A server may acknowledge an insert before it removes the insert from
				// its list of processes.
				Eventually(ctx, other.InFlight, patience, polling).WithArguments(slow).Should(BeFalse())
			})
		})

		ginkgo.Describe("Present", func() {
			ginkgo.It("finds exactly the events that are present", func(ctx ginkgo.SpecContext) {
				stored, others := oddities(), some(100)
				// Only the ids differ.
				sameButIDs := sink.Keys{EventID: others.EventID[:stored.Len()], EventType: stored.EventType, EventDateTime: stored.EventDateTime}
				absent := merged(&sameButIDs, &some(300).Keys)
				Expect(present(ctx, s, &stored.Keys)).To(BeEmpty())
				Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: copied(stored)})).To(Succeed())

				Expect(present(ctx, s, absent)).To(BeEmpty())
				Expect(present(ctx, s, &stored.Keys)).To(Equal(set(stored)))
				Expect(present(ctx, s, merged(absent, &stored.Keys))).To(Equal(set(stored)))
				Expect(present(ctx, s, &sink.Keys{})).To(BeEmpty())
			})

			ginkgo.It("finds events among tens of thousands", func(ctx ginkgo.SpecContext) {
				stored, absent := some(12_001), some(10_000)
				Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: copied(stored)})).To(Succeed())
				found, err := present(ctx, s, merged(&absent.Keys, &stored.Keys))
				Expect(err).NotTo(HaveOccurred())
				Expect(maps.Equal(found, set(stored))).To(BeTrue()) // a matcher would compare each key with all other keys
			})

			ginkgo.It("does not find another event with the same id", func(ctx ginkgo.SpecContext) {
				stored := some(4)
				Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: copied(stored)})).To(Succeed())
				queried := sink.Keys{EventID: stored.EventID, EventDateTime: slices.Clone(stored.EventDateTime)}
				queried.EventType.Append([]byte(stored.EventType.At(1) + "_too"))
				for i := 1; i < stored.Len(); i++ {
					queried.EventType.Append([]byte(stored.EventType.At(i)))
				}
				queried.EventDateTime[2]++
				Expect(s.Present(ctx, &queried)).To(Equal([]bool{false, true, false, true}))
			})

			ginkgo.It("returns a blind error instead of an absent event if rows are hidden", func(ctx ginkgo.SpecContext) {
				events := some(30)
				hiding, err := d.Hide("type_1")
				Expect(err).NotTo(HaveOccurred())
				ginkgo.DeferCleanup(hiding.Close)
				ginkgo.By("finding nothing hidden in an empty destination")
				Expect(present(ctx, hiding, &events.Keys)).To(BeEmpty())

				Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: copied(events)})).To(Succeed())
				_, err = hiding.Present(ctx, &events.Keys)
				blind, ok := errors.AsType[*sink.BlindError](err)
				Expect(ok).To(BeTrue(), "a *sink.BlindError: %v", err)
				Expect(blind.Problem).NotTo(BeEmpty())
				Expect(blind.Remedy).NotTo(BeEmpty())

				ginkgo.By("finding all of the visible events")
				visible := &sink.Events{}
				for i := range events.Len() {
					if events.EventType.At(i) != "type_1" {
						appendFrom(visible, events, i)
					}
				}
				Expect(present(ctx, hiding, &visible.Keys)).To(Equal(set(visible)))
				Expect(present(ctx, s, &events.Keys)).To(Equal(set(events)))
			})

			ginkgo.It("does not find an event that cannot be stored", func(ctx ginkgo.SpecContext) {
				events := some(2)
				Expect(s.Insert(ctx, sink.Batch{Token: token(), Events: copied(events)})).To(Succeed())
				events.EventDateTime[0] = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC).UnixMicro()
				events.EventID[0] = uuid.New()
				Expect(present(ctx, s, &events.Keys)).To(Equal(map[uuid.UUID]struct{}{events.EventID[1]: {}}))
			})
		})

		ginkgo.Describe("Partitions", func() {
			for _, sampled := range []int{0, 99} {
				ginkgo.It(fmt.Sprintf("have no row added under a token that event %d has used", sampled), func(ctx ginkgo.SpecContext) {
					events, sample, shared := some(100), &sink.Events{}, token()
					numbers, err := s.Partitions(ctx, &events.Keys)
					Expect(err).NotTo(HaveOccurred())
					Expect(numbers).To(HaveLen(events.Len()))
					appendFrom(sample, events, sampled)
					Expect(s.Insert(ctx, sink.Batch{Token: shared, Events: copied(sample)})).To(Succeed())
					Expect(s.Insert(ctx, sink.Batch{Token: shared, Events: copied(events)})).To(Succeed())
					after, err := d.Stored(ctx)
					Expect(err).NotTo(HaveOccurred())
					var covered []uuid.UUID
					for _, id := range after.EventID {
						if numbers[slices.Index(events.EventID, id)] == numbers[sampled] {
							covered = append(covered, id)
						}
					}
					Expect(covered).To(Equal(sample.EventID))
				})
			}
		})

		ginkgo.Describe("behind a network that fails", func() {
			var (
				p       *faults.Proxy
				through sink.Sink
			)
			ginkgo.BeforeEach(func() {
				p = faults.StartProxy(d.Addr)
				through = open(p.Addr())
			})

			ginkgo.It("returns unavailable errors while the server is unreachable, and works afterwards", func(ctx ginkgo.SpecContext) {
				Expect(through.Ping(ctx)).To(Succeed())
				p.Down()
				for _, err := range []error{
					through.Ping(ctx),
					through.Insert(ctx, sink.Batch{Token: token(), Events: some(5)}),
					second(through.InFlight(ctx, token())),
					second(present(ctx, through, &some(1).Keys)),
					through.Check(ctx),
				} {
					Expect(err).To(HaveOccurred())
					Expect(sink.ClassOf(err)).To(Equal(sink.Unavailable), "%v", err)
				}

				p.Up()
				Eventually(ctx, through.Ping, patience, polling).Should(Succeed())
				Expect(through.Insert(ctx, sink.Batch{Token: token(), Events: some(5)})).To(Succeed())
				Expect(count(ctx)).To(Equal(5))
			})

			ginkgo.It("stores no row of an insert that was cut off, and does not repeat it", func(ctx ginkgo.SpecContext) {
				events, cut := withContexts(4, 1<<20), token()
				p.CutOnce(1 << 20)
				err := through.Insert(ctx, sink.Batch{Token: cut, Events: copied(events)})
				Expect(err).To(HaveOccurred())
				Expect(sink.ClassOf(err)).To(Equal(sink.Unavailable), "%v", err)

				Eventually(ctx, s.InFlight, patience, polling).WithArguments(cut).Should(BeFalse())
				Expect(present(ctx, s, &events.Keys)).To(BeEmpty())
				Expect(count(ctx)).To(BeZero())

				ginkgo.By("inserting the batch again under its token")
				Expect(through.Insert(ctx, sink.Batch{Token: cut, Events: copied(events)})).To(Succeed())
				Expect(stored(ctx)).To(equalEvents(sorted(events)))
			})

			ginkgo.It("finds rows of an insert that was not acknowledged, and does not add them again", func(ctx ginkgo.SpecContext) {
				events, lost := withContexts(4, 1<<20), token()
				p.Hold(faults.Answers, 1<<20)
				waiting, giveUp := context.WithCancel(ctx)
				done := make(chan error, 1)
				go func() { done <- through.Insert(waiting, sink.Batch{Token: lost, Events: copied(events)}) }()
				Eventually(ctx, count, patience, polling).Should(Equal(4))
				Consistently(done).ShouldNot(Receive())
				giveUp()
				var err error
				Eventually(ctx, done, patience, polling).Should(Receive(&err))
				Expect(err).To(MatchError(context.Canceled))

				Eventually(ctx, s.InFlight, patience, polling).WithArguments(lost).Should(BeFalse())
				Expect(present(ctx, s, &events.Keys)).To(Equal(set(events)))
				Expect(s.Insert(ctx, sink.Batch{Token: lost, Events: copied(events)})).To(Succeed())
				Expect(count(ctx)).To(Equal(4))
			})
		})

		ginkgo.Describe("a deadline", func() {
			ginkgo.It("ends the call, and the execution soon after", func(ctx ginkgo.SpecContext) {
				Expect(d.Slow(ctx, 20*time.Second)).To(Succeed())
				late := token()
				short, cancel := context.WithTimeout(ctx, time.Second)
				defer cancel()
				err := s.Insert(short, sink.Batch{Token: late, Events: some(10)})
				Expect(err).To(HaveOccurred())
				Expect(sink.ClassOf(err)).To(Equal(sink.Unavailable), "%v", err)
				Eventually(ctx, s.InFlight, patience, polling).WithArguments(late).Should(BeFalse())
			})

			ginkgo.It("that has passed prevents the insert", func(ctx ginkgo.SpecContext) {
				past, cancel := context.WithDeadline(ctx, time.Now().Add(-time.Second))
				defer cancel()
				err := s.Insert(past, sink.Batch{Token: token(), Events: some(10)})
				Expect(err).To(MatchError(context.DeadlineExceeded))
				Expect(sink.ClassOf(err)).To(Equal(sink.Unavailable))
				Expect(count(ctx)).To(BeZero())
			})

			ginkgo.It("that has passed while the process was suspended prevents the insert", func(ctx ginkgo.SpecContext) {
				err := s.Insert(overslept{ctx}, sink.Batch{Token: token(), Events: some(10)})
				Expect(err).To(MatchError(context.DeadlineExceeded))
				Expect(sink.ClassOf(err)).To(Equal(sink.Unavailable))
				Expect(count(ctx)).To(BeZero())
			})
		})

		ginkgo.Describe("Destination", func() {
			ginkgo.It("is the same for every sink on the destination, and differs for another one", func(ctx ginkgo.SpecContext) {
				destination, err := s.Destination(ctx)
				Expect(err).NotTo(HaveOccurred())
				Expect(destination).NotTo(BeEmpty())
				Expect(open(d.Addr).Destination(ctx)).To(Equal(destination))
				Expect(open(faults.StartProxy(d.Addr).Addr()).Destination(ctx)).To(Equal(destination))
				other, err := arrange(ctx).Open(d.Addr)
				Expect(err).NotTo(HaveOccurred())
				ginkgo.DeferCleanup(other.Close)
				Expect(other.Destination(ctx)).NotTo(Equal(destination))
			})
		})

		ginkgo.Describe("Check", func() {
			ginkgo.It("passes if the promises can be kept", func(ctx ginkgo.SpecContext) {
				Expect(s.Check(ctx)).To(Succeed())
			})

			ginkgo.It("names the problem and the remedy if the promises cannot be kept", func(ctx ginkgo.SpecContext) {
				Expect(d.Spoil(ctx)).To(Succeed())
				misconfigured, ok := errors.AsType[*sink.MisconfiguredError](s.Check(ctx))
				Expect(ok).To(BeTrue())
				Expect(misconfigured.Problem).NotTo(BeEmpty())
				Expect(misconfigured.Remedy).NotTo(BeEmpty())
			})
		})
	})
}

// overslept is a context after its deadline whose timer has not fired yet.
type overslept struct{ context.Context } //nolint:containedctx // the type is a context

// Deadline implements context.Context.
func (overslept) Deadline() (time.Time, bool) { return time.Now().Add(-time.Second), true }

// present returns the ids of the events that are present.
func present(ctx context.Context, s sink.Sink, keys *sink.Keys) (map[uuid.UUID]struct{}, error) {
	found, err := s.Present(ctx, keys)
	if err != nil {
		return nil, err
	}
	ids := map[uuid.UUID]struct{}{}
	for i, id := range keys.EventID {
		if found[i] {
			ids[id] = struct{}{}
		}
	}
	return ids, nil
}

func second[T any](_ T, err error) error { return err }
