package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

const (
	riverEvents     = 50_000
	watermillEvents = 300_000
)

// benchPeers drains the outbox alternately with the relay and with other libraries.
// The libraries have the settings that make them fast. The relay does more work,
// because the other consumers discard the events.
func benchPeers(ctx context.Context, b *bench) (err error) {
	path, err := filepath.Abs(b.peers)
	if err != nil {
		return err //nolint:wrapcheck // the error names the path
	}
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	relayed := b.newSeries("one relay, into ClickHouse", "events/s")
	n := b.scaled(million, blockRows)
	cases := []func(context.Context) error{func(ctx context.Context) error {
		drained, err := d.drain(ctx, typical(n))
		relayed.add(float64(n) / drained.took.Seconds())
		return err
	}}
	var rates []*series
	for _, peer := range []struct {
		name, about string
		events      int
	}{
		{"watermill", "watermill-sql queue, batches of 1,000, discarded", b.scaled(watermillEvents, 1000)},
		{"river", "river, 1,000 workers, discarded", b.scaled(riverEvents, 1000)},
	} {
		rate := b.newSeries(peer.about, "events/s")
		rates = append(rates, rate)
		cases = append(cases, func(ctx context.Context) error {
			took, err := d.runPeer(ctx, path, peer.name, peer.events)
			rate.add(float64(peer.events) / took.Seconds())
			return err
		})
	}
	if err := b.inRounds(ctx, cases...); err != nil {
		return err
	}
	relayed.show(b.out)
	for i, name := range []string{"relay_vs_watermill", "relay_vs_river"} {
		rates[i].show(b.out)
		b.compare(name, relayed, rates[i])
	}
	return nil
}

// runPeer drains n events with the program of bench/peers and returns the time.
func (d *database) runPeer(ctx context.Context, path, peer string, n int) (time.Duration, error) {
	cmd := exec.CommandContext(ctx, path, peer, d.dsn, strconv.Itoa(n)) //nolint:gosec // our own program
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	output, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("%s: %w: %s", peer, err, bytes.TrimSpace(stderr.Bytes()))
	}
	seconds, err := strconv.ParseFloat(string(bytes.TrimSpace(output)), 64)
	if err != nil {
		return 0, fmt.Errorf("unexpected output of %s: %s", peer, output)
	}
	return time.Duration(seconds * float64(time.Second)), nil
}
