package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/stack"
)

// upCommand returns the command `devstack up`, which `make run` runs.
func upCommand() *cobra.Command {
	var o stack.Options
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run PostgreSQL, ClickHouse, the API and the relay until Ctrl-C",
		Long: "Run PostgreSQL, ClickHouse, the API and the relay until Ctrl-C. The data stay.\n\n" +
			"The API and the relay inherit the DIEHARD_ variables of the environment. An environment\n" +
			"variable can set each flag too: " + stack.Variable("--postgres-port") + " sets --postgres-port.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := completeStackFlags(cmd.Context(), cmd.Flags()); err != nil {
				return err
			}
			o.Out, o.Logs = os.Stdout, stack.TerminalLogs(os.Stdout)
			return up(cmd.Context(), o)
		},
	}
	addStackFlags(cmd.Flags(), &o)
	return cmd
}

func up(ctx context.Context, o stack.Options) error {
	o.Hurry = secondSignal(ctx)
	s, err := stack.Start(ctx, o)
	if err != nil {
		if ctx.Err() != nil {
			return nil //nolint:nilerr // stopped while it started
		}
		return err
	}
	fmt.Print(s.Panel()) //nolint:forbidigo // the output of the command
	err = s.Wait(ctx)
	s.Stop()
	return err
}

// secondSignal returns a channel that is closed when a second signal arrives, after the
// signal that ended ctx.
func secondSignal(ctx context.Context) <-chan struct{} {
	hurry := make(chan struct{})
	context.AfterFunc(ctx, func() {
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
		<-signals
		close(hurry)
	})
	return hurry
}

func addStackFlags(flags *pflag.FlagSet, o *stack.Options) {
	flags.StringVar(&o.Dir, "dir", ".devstack", "folder for data and logs")
	flags.StringVar(&o.Bin, "bin", besidesThis(), "folder with the programs api and relay")
	for _, port := range usualPorts {
		flags.IntVar(port.option(o), port.flag, port.usual, port.usage+" (if the default is taken: a free port)")
	}
	flags.StringVar(&o.APIAddr, "http-addr", "127.0.0.1:8080", "address of the API; also set by DIEHARD_HTTP_ADDR")
	flags.StringVar(&o.APIAdminAddr, "api-admin-addr", "127.0.0.1:9090", "address of the API's admin port")
	flags.StringVar(&o.RelayAdminAddr, "relay-admin-addr", "127.0.0.1:9091", "address of the relay's admin port")
}

// usualPorts are the default ports of the databases. They differ from the
// standard ports, which a developer's own servers may use.
var usualPorts = []struct {
	flag, usage string
	usual       int
	option      func(*stack.Options) *int
}{
	{"postgres-port", "port of PostgreSQL", 15432, func(o *stack.Options) *int { return &o.PostgresPort }},
	{"clickhouse-http-port", "port of ClickHouse's HTTP interface", 18123, func(o *stack.Options) *int { return &o.ClickHouseHTTPPort }},
	{"clickhouse-native-port", "port of ClickHouse's native protocol", 19000, func(o *stack.Options) *int { return &o.ClickHouseNativePort }},
}

// completeStackFlags sets the flags that were not given: from the environment,
// or to a free port if the default port is taken.
func completeStackFlags(ctx context.Context, flags *pflag.FlagSet) error {
	if err := setFromEnvironment(flags); err != nil {
		return err
	}
	for _, port := range usualPorts {
		if flags.Changed(port.flag) {
			continue
		}
		listener, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port.usual)))
		if err == nil {
			_ = listener.Close()
			continue
		}
		if err := flags.Set(port.flag, "0"); err != nil {
			return fmt.Errorf("--%s: %w", port.flag, err)
		}
	}
	return nil
}

// besidesThis returns the folder of this program.
func besidesThis() string {
	path, err := os.Executable()
	if err != nil {
		return "bin"
	}
	return filepath.Dir(path)
}

func setFromEnvironment(flags *pflag.FlagSet) (err error) {
	flags.VisitAll(func(flag *pflag.Flag) {
		variables := []string{stack.Variable(flag.Name)}
		if flag.Name == "http-addr" {
			variables = append(variables, "DIEHARD_HTTP_ADDR")
		}
		for _, variable := range variables {
			value := os.Getenv(variable)
			if value == "" || flag.Changed || err != nil {
				continue
			}
			if setErr := flags.Set(flag.Name, value); setErr != nil {
				err = fmt.Errorf("%s: %w", variable, setErr)
			}
		}
	})
	return err
}
