// Command bench measures Diehard against the limits of the two databases. Each
// case alternates with its reference on the same engines, so that the results
// are ratios. docs/benchmarks.md explains each figure.
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

// part is a named group of cases.
type part struct {
	name  string
	about string
	run   func(ctx context.Context, b *bench) error
}

var parts = []part{
	{"latency", "time from commit to queryable", benchLatency},
	{"api", "POST /v1/users, compared with pgbench", benchAPI},
	{"publish", "a transaction with one Publish, compared with the bare INSERT", benchPublish},
	{"batch", "POST /v1/users/batch, compared with COPY", benchBatch},
	{"relay", "draining an outbox, compared with the bare pipe; CPU and memory", benchRelay},
	{"peers", "draining, compared with river and watermill-sql", benchPeers},
	{"outage", "creating users with a dead ClickHouse, compared with a running one", benchOutage},
	{"traces", "creating users and draining with a collector that hangs, compared with no traces", benchTraces},
	{"growth", "the last cuts, polls and claims of a backlog, compared with the first", benchGrowth},
	{"replicas", "draining with eight relays, compared with one", benchReplicas},
	{"size", "the outbox on the disk after 10 million events, compared with 1 million", benchSize},
	{"idle", "an idle relay", benchIdle},
	{"scrape", "scrapes of a relay while 5 million events wait", benchScrape},
	{"large", "events of 4 MB", benchLarge},
}

// options holds the command line's options.
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
	flags.IntVar(&o.rounds, "rounds", 5, "number of runs of each case")
	flags.Float64Var(&o.scale, "scale", 1, "factor for the numbers of events and the durations; below 1 the run is a trial with meaningless figures")
	flags.BoolVar(&o.json, "json", false, "print the results as JSON")
	flags.StringVar(&o.docs, "docs", "", "write the results to this page: its tables, its chart, and a JSON file beside it")
	flags.StringVar(&o.redraw, "redraw", "", "measure nothing; write this page's tables and chart again from the JSON file beside it")
	flags.StringVar(&o.programs, "programs", "bin", "folder with the programs api and relay")
	flags.StringVar(&o.peers, "peers", "bin/peers", "path of the program of bench/peers")
	if err := flags.Parse(args); err != nil {
		return o, err //nolint:wrapcheck // flag has printed it
	}
	o.parts = flags.Args()
	for _, name := range o.parts {
		if !slices.ContainsFunc(parts, func(p part) bool { return p.name == name }) {
			return o, fmt.Errorf("unknown part %q; bench -h lists them", name)
		}
	}
	if o.rounds < 1 || o.scale <= 0 || o.scale > 1 {
		return o, errors.New("rounds must be at least 1; scale must be above 0 and at most 1")
	}
	o.programs, err = filepath.Abs(o.programs)
	return o, err //nolint:wrapcheck // the error names the path
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
		os.Exit(2) //nolint:gocritic // no important deferred call yet
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
		return encoder.Encode(results) //nolint:wrapcheck // cannot fail with this type
	}
	fmt.Fprintln(out)
	for _, figure := range results.Figures {
		fmt.Fprintf(out, "%s: %s\n", figure.Name, strings.TrimSpace(figure.text()))
	}
	return nil
}
