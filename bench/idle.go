package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"time"
)

const idleTime = 20 * time.Second

// benchIdle measures the cost of an idle relay.
func benchIdle(ctx context.Context, b *bench) (err error) {
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	if _, err := d.ExecContext(ctx, "CREATE EXTENSION IF NOT EXISTS pg_stat_statements"); err != nil {
		return fmt.Errorf("count queries: %w", err)
	}
	relay, err := d.startProgram(ctx, "relay")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, relay.stop()) }()
	// The relay's start ends with its first poll. The figures exclude it.
	if err := pause(ctx, b.during(idleTime/3)); err != nil {
		return err
	}
	cpu, rate := b.newSeries("CPU of an idle relay", "%"), b.newSeries("queries of an idle relay", "1/min")
	err = b.inRounds(ctx, func(ctx context.Context) error {
		if _, err := d.ExecContext(ctx, "SELECT pg_stat_statements_reset()"); err != nil {
			return fmt.Errorf("count queries: %w", err)
		}
		before, err := cpuTime(relay.cmd.Process.Pid)
		if err != nil {
			return err
		}
		start := time.Now()
		if err := pause(ctx, b.during(idleTime)); err != nil {
			return err
		}
		after, err := cpuTime(relay.cmd.Process.Pid)
		if err != nil {
			return err
		}
		took := time.Since(start)
		var queries float64
		err = d.GetContext(ctx, &queries, `SELECT coalesce(sum(calls), 0) FROM pg_stat_statements
			WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
			  AND query NOT LIKE '%pg_stat_statements%'`)
		if err != nil {
			return fmt.Errorf("count queries: %w", err)
		}
		cpu.add(100 * (after - before).Seconds() / took.Seconds())
		rate.add(queries / took.Minutes())
		return nil
	})
	if err != nil {
		return err
	}
	cpu.show(b.out)
	rate.show(b.out)
	b.figure("relay_idle_cpu_percent", cpu.median())
	b.figure("relay_idle_queries_per_min", rate.median())
	return nil
}

const (
	largeEvents = 50 // few, because PostgreSQL spends most of a run compressing them
	largeBytes  = 4 << 20
)

// benchLarge drains incompressible events of 4 MiB.
func benchLarge(ctx context.Context, b *bench) (err error) {
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	n := b.scaled(largeEvents, 8)
	rate, memory := b.newSeries("events of 4 MB", "MB/s"), b.newSeries("the relay's peak RSS, events of 4 MB", "MB")
	noise := make([]byte, largeBytes/4*3) // four characters for three bytes
	if _, err := rand.Read(noise); err != nil {
		return err //nolint:wrapcheck // cannot fail
	}
	large := events{n: n, context: "to_json(n || $1::text)", args: []any{base64.StdEncoding.EncodeToString(noise)}}
	err = b.inRounds(ctx, func(ctx context.Context) error {
		drained, err := d.drain(ctx, large)
		if err != nil {
			return err
		}
		rate.add(float64(n) * largeBytes / 1e6 / drained.took.Seconds())
		memory.add(drained.peakRSS)
		return nil
	})
	if err != nil {
		return err
	}
	rate.show(b.out)
	memory.show(b.out)
	b.figure("large_mb_per_s", rate.median())
	b.figure("large_peak_rss_mb", memory.median())
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err() //nolint:wrapcheck // the caller has ended the run
	case <-time.After(d):
		return nil
	}
}
