package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
)

const tracedClients = 32

// distinctTraces is the SQL expression of a traceparent: each event belongs to another
// sampled trace.
const distinctTraces = `'00-' || md5(n::text) || '-' || left(md5((-n)::text), 16) || '-01'`

// benchTraces compares programs that export traces with programs that do not. The
// collector accepts connections and never responds.
func benchTraces(ctx context.Context, b *bench) (err error) {
	d, err := b.database(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.drop(ctx)) }()
	collector, err := startHanging(ctx)
	if err != nil {
		return err
	}
	defer collector.close()
	traced := "OTEL_EXPORTER_OTLP_ENDPOINT=http://" + collector.Addr().String()
	if err := b.tracedCreates(ctx, d, traced); err != nil {
		return err
	}
	return b.tracedDrains(ctx, d, traced)
}

func (b *bench) tracedCreates(ctx context.Context, d *database, traced string) (err error) {
	with, without := b.newPairs("POST /v1/users", "1/s", "the API's CPU for a request")
	measure := func(api *program, s pair) func(context.Context) error {
		return d.emptied(func(ctx context.Context) error {
			before, err := cpuTime(api.cmd.Process.Pid)
			if err != nil {
				return err
			}
			rate, n, err := load(ctx, api.http, tracedClients, b.during(createTime), false)
			if err != nil {
				return err
			}
			after, err := cpuTime(api.cmd.Process.Pid)
			s.add(rate, (after-before).Seconds()/float64(n))
			return err
		})
	}
	tracing, err := d.startProgram(ctx, "api", traced)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tracing.stop()) }()
	plain, err := d.startProgram(ctx, "api")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, plain.stop()) }()
	if err := b.inRounds(ctx, measure(tracing, with), measure(plain, without)); err != nil {
		return err
	}
	b.comparePairs("api", with, without)
	return nil
}

func (b *bench) tracedDrains(ctx context.Context, d *database, traced string) error {
	with, without := b.newPairs("one relay", "events/s", "the relay's CPU for an event")
	e := typical(b.scaled(million, blockRows))
	e.traceparent = distinctTraces
	measure := func(s pair, env ...string) func(context.Context) error {
		return func(ctx context.Context) error {
			drained, err := d.drain(ctx, e, env...)
			if err != nil {
				return err
			}
			s.add(float64(e.n)/drained.took.Seconds(), drained.cpu[0].Seconds()/float64(e.n))
			return nil
		}
	}
	if err := b.inRounds(ctx, measure(with, traced), measure(without)); err != nil {
		return err
	}
	b.comparePairs("relay", with, without)
	return nil
}

// pair is the rate of a program, and its CPU time for each request or event.
type pair struct{ rate, cpu *series }

// newPairs returns the pairs of a program that exports traces and of one that does not.
func (b *bench) newPairs(rate, unit, cpu string) (with, without pair) {
	const traced, untraced = ", traced, collector hangs", ", not traced"
	return pair{b.newSeries(rate+traced, unit), b.newSeries(cpu+traced, "us")},
		pair{b.newSeries(rate+untraced, unit), b.newSeries(cpu+untraced, "us")}
}

func (p pair) add(rate, cpuSeconds float64) {
	p.rate.add(rate)
	p.cpu.add(cpuSeconds * microsPerUnit)
}

func (b *bench) comparePairs(program string, with, without pair) {
	for _, s := range []*series{with.rate, without.rate, with.cpu, without.cpu} {
		s.show(b.out)
	}
	b.compare(program+"_traces_hanging", with.rate, without.rate)
	b.compare(program+"_traces_hanging_cpu", with.cpu, without.cpu)
}

// hanging is a server that accepts connections and never responds.
type hanging struct {
	net.Listener

	mu    sync.Mutex
	conns []net.Conn
}

func startHanging(ctx context.Context) (*hanging, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("start a collector: %w", err)
	}
	h := &hanging{Listener: listener}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			h.mu.Lock()
			h.conns = append(h.conns, conn)
			h.mu.Unlock()
		}
	}()
	return h, nil
}

func (h *hanging) close() {
	_ = h.Close()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, conn := range h.conns {
		_ = conn.Close()
	}
}
