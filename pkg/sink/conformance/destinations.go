package conformance

import (
	"context"
	"fmt"
	"slices"

	"github.com/diehard-outbox/diehard/pkg/sink"
)

var destinations = []Case{
	{"every server has the same destination", func(ctx context.Context, h Harness) error {
		expected, err := h.Sink.Destination(ctx)
		if err != nil {
			return err
		}
		for _, s := range h.Others {
			destination, err := s.Destination(ctx)
			if err != nil {
				return err
			}
			if destination == "" || destination != expected {
				return fmt.Errorf("the destination of one server is %q, and of another server %q", expected, destination)
			}
		}
		return nil
	}},
	{"every server passes the relay's own check", func(ctx context.Context, h Harness) error {
		for _, s := range slices.Concat([]sink.Sink{h.Sink}, h.Others) {
			if err := s.Check(ctx); err != nil {
				return err
			}
		}
		return nil
	}},
}
