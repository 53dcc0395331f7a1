// Command bench measures Diehard against what the two databases allow: each
// case runs several times in turns with its reference, on the same engines, so
// that what it prints are ratios. docs/benchmarks.md says what each figure
// means.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/diehard-outbox/diehard/tools/devstack/progress"
)

// part is a group of cases that is run by its name.
type part struct {
	name  string
	about string
	run   func(ctx context.Context, b *bench) error
}

var parts = []part{
	{"latency", "from commit to queryable", benchLatency},
	{"api", "POST /v1/users against pgbench", benchAPI},
	{"publish", "a transaction with one Publish against one with the bare INSERT", benchPublish},
	{"batch", "POST /v1/users/batch against COPY", benchBatch},
	{"relay", "draining an outbox against the bare pipe; CPU and memory", benchRelay},
	{"peers", "draining against river and watermill-sql", benchPeers},
	{"outage", "creating users with ClickHouse dead against alive", benchOutage},
	{"growth", "cuts and claims, late against early", benchGrowth},
	{"replicas", "draining with eight relays against one", benchReplicas},
	{"size", "the outbox on the disk after 10 million events against 1 million", benchSize},
	{"idle", "a relay with nothing to do", benchIdle},
	{"large", "events of 4 MB", benchLarge},
}

// options are the command line's.
type options struct {
	parts    []string
	rounds   int
	scale    float64
	json     bool
	docs     string
	redraw   string
	programs string
	peers    string
}

func parse(args []string) (o options, err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "Usage: bench [flags] [part …]")
		fmt.Fprintln(flags.Output(), "Without a part it runs all of them:")
		for _, p := range parts {
			fmt.Fprintf(flags.Output(), "  %-9s %s\n", p.name, p.about)
		}
		flags.PrintDefaults()
	}
	flags.IntVar(&o.rounds, "rounds", 5, "how often each case is run")
	flags.Float64Var(&o.scale, "scale", 1, "a factor for numbers of events and for times; below 1 it is a trial, and the figures mean nothing")
	flags.BoolVar(&o.json, "json", false, "print the results as JSON")
	flags.StringVar(&o.docs, "docs", "", "keep the results beside this page too, and write its tables and its chart from them")
	flags.StringVar(&o.redraw, "redraw", "", "measure nothing, and write this page's tables and its chart from the results beside it")
	flags.StringVar(&o.programs, "programs", "bin", "the folder of the programs api and relay")
	flags.StringVar(&o.peers, "peers", "bin/peers", "the program of bench/peers")
	if err := flags.Parse(args); err != nil {
		return o, err //nolint:wrapcheck // flag has printed it
	}
	o.parts = flags.Args()
	for _, name := range o.parts {
		if !slices.ContainsFunc(parts, func(p part) bool { return p.name == name }) {
			return o, fmt.Errorf("there is no part %q; bench -h lists them", name)
		}
	}
	if o.rounds < 1 || o.scale <= 0 || o.scale > 1 {
		return o, errors.New("rounds must be at least 1, and scale above 0 and at most 1")
	}
	o.programs, err = filepath.Abs(o.programs)
	return o, err //nolint:wrapcheck // names the path
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	o, err := parse(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2) //nolint:gocritic // nothing is deferred that matters yet
	}
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	if o.redraw != "" {
		return drawPage(o.redraw)
	}
	var out io.Writer = os.Stdout
	if o.json {
		out = os.Stderr
	}
	b := newBench(o, out)
	defer func() { err = errors.Join(err, b.close()) }()
	defer progress.EveryMinute(out, func() string { return "bench: " + *b.stage.Load() })()
	chosen := slices.DeleteFunc(slices.Clone(parts), func(p part) bool {
		return len(o.parts) > 0 && !slices.Contains(o.parts, p.name)
	})
	for i, p := range chosen {
		b.part = fmt.Sprintf("%s (part %d of %d): ", p.name, i+1, len(chosen))
		b.at("starting")
		fmt.Fprintf(out, "\n%s: %s\n", p.name, p.about)
		if err := p.run(ctx, b); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	results, err := b.results(ctx)
	if err != nil {
		return err
	}
	if o.docs != "" {
		if err := writePage(o.docs, results); err != nil {
			return err
		}
	}
	if o.json {
		encoder := json.NewEncoder(os.Stdout)
		encoder.SetIndent("", "  ")
		return encoder.Encode(results) //nolint:wrapcheck // a plain value
	}
	fmt.Fprintln(out)
	for _, figure := range results.Figures {
		fmt.Fprintf(out, "%s: %s\n", figure.Name, strings.TrimSpace(figure.text()))
	}
	return nil
}
