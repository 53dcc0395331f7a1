// Package sinktest is the conformance suite of sink.Sink as Ginkgo specs. It runs the cases
// of package conformance, and adds specs that cause faults. Every sink passes it on a real
// server.
package sinktest

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/faults"
	"github.com/diehard-outbox/diehard/pkg/sink"
	"github.com/diehard-outbox/diehard/pkg/sink/conformance"
	"github.com/diehard-outbox/diehard/pkg/sink/internal/sample"
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
	// Slow, Refuse and Window are as in conformance.Harness.
	Slow   func(ctx context.Context, d time.Duration) (conformance.Restore, error)
	Refuse func(ctx context.Context, eventType string) (conformance.Restore, error)
	Window int
	// Hide opens a sink from which the destination hides the rows of the event type, as a
	// row policy does. The sink's own settings cannot prevent this.
	Hide func(eventType string) (sink.Sink, error)
	// Spoil removes a property of the destination that the sink's promises need.
	Spoil func(ctx context.Context) error
}

// harness returns the harness of the sinks. They are open on the destination.
func (d Destination) harness(s sink.Sink, others ...sink.Sink) conformance.Harness {
	return conformance.Harness{
		Sink:   s,
		Others: others,
		Stored: func(ctx context.Context, ids []uuid.UUID) (*sink.Events, error) {
			stored, err := d.Stored(ctx)
			if err != nil {
				return nil, err
			}
			return sample.Filter(stored, ids), nil
		},
		Slow:   d.Slow,
		Refuse: d.Refuse,
		Window: d.Window,
	}
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

		for _, c := range conformance.Cases() {
			ginkgo.It(c.Name, func(ctx ginkgo.SpecContext) {
				Expect(c.Run(ctx, d.harness(s, open(d.Addr)))).To(Succeed())
			})
		}

		ginkgo.Describe("Present", func() {
			ginkgo.It("returns a blind error instead of an absent event if rows are hidden", func(ctx ginkgo.SpecContext) {
				events := sample.Events(30)
				hiding, err := d.Hide("type_1")
				Expect(err).NotTo(HaveOccurred())
				ginkgo.DeferCleanup(hiding.Close)
				ginkgo.By("finding nothing hidden in an empty destination")
				Expect(present(ctx, hiding, &events.Keys)).To(BeEmpty())

				Expect(s.Insert(ctx, sample.Batch(sample.Token(), events))).To(Succeed())
				_, err = hiding.Present(ctx, &events.Keys)
				blind, ok := errors.AsType[*sink.BlindError](err)
				Expect(ok).To(BeTrue(), "a *sink.BlindError: %v", err)
				Expect(blind.Problem).NotTo(BeEmpty())
				Expect(blind.Remedy).NotTo(BeEmpty())

				ginkgo.By("finding all of the visible events")
				visible := &sink.Events{}
				for i := range events.Len() {
					if events.EventType.At(i) != "type_1" {
						sample.AppendFrom(visible, events, i)
					}
				}
				Expect(present(ctx, hiding, &visible.Keys)).To(Equal(set(visible)))
				Expect(present(ctx, s, &events.Keys)).To(Equal(set(events)))
			})
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
					through.Insert(ctx, sample.Batch(sample.Token(), sample.Events(5))),
					second(through.InFlight(ctx, sample.Token())),
					second(present(ctx, through, &sample.Events(1).Keys)),
					through.Check(ctx),
				} {
					Expect(err).To(HaveOccurred())
					Expect(sink.ClassOf(err)).To(Equal(sink.Unavailable), "%v", err)
				}

				p.Up()
				Eventually(ctx, through.Ping, patience, polling).Should(Succeed())
				Expect(through.Insert(ctx, sample.Batch(sample.Token(), sample.Events(5)))).To(Succeed())
				Expect(count(ctx)).To(Equal(5))
			})

			ginkgo.It("stores no row of an insert that was cut off, and does not repeat it", func(ctx ginkgo.SpecContext) {
				events, cut := sample.WithContexts(4, 1<<20), sample.Token()
				p.CutOnce(1 << 20)
				err := through.Insert(ctx, sample.Batch(cut, events))
				Expect(err).To(HaveOccurred())
				Expect(sink.ClassOf(err)).To(Equal(sink.Unavailable), "%v", err)

				Eventually(ctx, s.InFlight, patience, polling).WithArguments(cut).Should(BeFalse())
				Expect(present(ctx, s, &events.Keys)).To(BeEmpty())
				Expect(count(ctx)).To(BeZero())

				ginkgo.By("inserting the batch again under its token")
				Expect(through.Insert(ctx, sample.Batch(cut, events))).To(Succeed())
				stored, err := d.Stored(ctx)
				Expect(err).NotTo(HaveOccurred())
				Expect(sample.Difference(events, stored)).To(BeEmpty())
			})

			ginkgo.It("finds rows of an insert that was not acknowledged, and does not add them again", func(ctx ginkgo.SpecContext) {
				events, lost := sample.WithContexts(4, 1<<20), sample.Token()
				p.Hold(faults.Answers, 1<<20)
				waiting, giveUp := context.WithCancel(ctx)
				done := make(chan error, 1)
				go func() { done <- through.Insert(waiting, sample.Batch(lost, events)) }()
				Eventually(ctx, count, patience, polling).Should(Equal(4))
				Consistently(done).ShouldNot(Receive())
				giveUp()
				var err error
				Eventually(ctx, done, patience, polling).Should(Receive(&err))
				Expect(err).To(MatchError(context.Canceled))

				Eventually(ctx, s.InFlight, patience, polling).WithArguments(lost).Should(BeFalse())
				Expect(present(ctx, s, &events.Keys)).To(Equal(set(events)))
				Expect(s.Insert(ctx, sample.Batch(lost, events))).To(Succeed())
				Expect(count(ctx)).To(Equal(4))
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

func set(e *sink.Events) map[uuid.UUID]struct{} {
	s := make(map[uuid.UUID]struct{}, e.Len())
	for _, id := range e.EventID {
		s[id] = struct{}{}
	}
	return s
}
