// Package cli implements the command line of the programs: loading the
// configuration, logging, reporting errors, and exit codes.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.opentelemetry.io/otel/trace"

	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/telemetry"
)

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2 // the command line or the configuration is invalid
)

// Settings is the configuration of a program.
type Settings interface {
	WriteYAML(w io.Writer) error
	WriteJSON(w io.Writer) error
}

// Program describes one of Diehard's programs. In addition to its own commands, it
// has the commands config and version.
type Program[S Settings] struct {
	Name, Short string
	// Version is the version set by the linker. If it is empty or "dev", Main uses
	// the module version that the go command recorded.
	Version string

	// AddFlags adds a flag for each configuration key. Load reads the configuration. Both
	// functions come from package config.
	AddFlags func(*pflag.FlagSet)
	Load     func(config.LoadOptions) (S, []string, error)
	// Reporting returns the settings of logs and error reports.
	Reporting func(S) Reporting

	// Commands are the program's own commands. The first is the default.
	Commands []Command[S]
}

// Reporting configures logs and error reports.
type Reporting struct {
	Environment string
	Log         config.Log
	Sentry      config.Sentry
}

// Command is a command of a program. It has exactly one of Run, Answer and
// Commands.
type Command[S Settings] struct {
	Name, Short string
	// Long is the help text that follows Short.
	Long string

	// Run does the program's work. It returns when the work is done or when a signal ends
	// ctx. The program prints a *config.Error and logs all other errors.
	Run func(ctx context.Context, p Process, settings S) error

	// Answer writes the command's output to p.Out and returns. The program prints an
	// error in one line. It does not log the start or the end of the command.
	Answer func(ctx context.Context, p Process, settings S) error
	// Offline allows required keys of the configuration to be empty.
	Offline bool
	// Arguments names Answer's arguments in the help, such as ID.... If it is empty, the
	// command accepts no arguments.
	Arguments string
	// AddFlags adds Answer's own flags. They hide configuration flags of the same
	// name. It can be nil.
	AddFlags func(*pflag.FlagSet)

	// Printed writes the SQL that Run executes. If Printed is not empty, the command has
	// the flag --print. With this flag, the command executes no SQL and needs no
	// database.
	Printed []Printed[S]

	Commands []Command[S]
}

// Printed writes the SQL that a command executes in one database.
type Printed[S Settings] struct {
	// Name is the value of --print that selects this SQL.
	Name  string
	Print func(w io.Writer, settings S) error
}

// Process contains the values that a command receives from the running program.
type Process struct {
	Version string
	Log     *slog.Logger
	// Tracer makes spans. It is nil if the export of traces is off.
	Tracer trace.Tracer
	// Args and Out are set for commands with Answer.
	Args []string
	Out  io.Writer
}

// Main runs the command line of the process and returns its exit code.
func (p Program[S]) Main() int {
	info, _ := debug.ReadBuildInfo()
	p.Version = version(p.Version, info)

	// The first signal stops the program gracefully, the second kills it.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)

	err := p.command().ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	code := exitFailed
	if _, ok := errors.AsType[*usageError](err); ok {
		code = exitUsage
	}
	if _, ok := errors.AsType[*config.Error](err); ok {
		code = exitUsage
	}
	if _, ok := errors.AsType[*loggedError](err); !ok {
		fmt.Fprintf(os.Stderr, "%s: %v\n", p.Name, err)
	}
	return code
}

// usageError is an error in the command line.
type usageError struct{ error }

// UsageError returns an error for an invalid command line. The program exits
// with code 2.
func UsageError(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// loggedError is an error that has been logged.
type loggedError struct{ error }

// ShownError returns an error that the output of the command shows already. The program
// exits with code 1.
func ShownError(err error) error { return &loggedError{err} }

func (p Program[S]) command() *cobra.Command {
	root := &cobra.Command{
		Use:           p.Name,
		Short:         p.Short,
		Long:          p.Short + ".\n\nThe default command is `" + p.Name + " " + p.Commands[0].Name + "`.",
		Args:          p.noArguments,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	// Every command that reads the configuration accepts the configuration flags.
	file := root.PersistentFlags().String("config", "", "configuration file in YAML")
	p.AddFlags(root.PersistentFlags())

	// The command's own flags are excluded, because such a flag can have the name of a
	// key.
	load := func(offline bool) (S, []string, error) {
		return p.Load(config.LoadOptions{File: *file, Flags: root.PersistentFlags(), Offline: offline})
	}
	for i, command := range p.Commands {
		cmd := p.commandLine(command, load)
		if i == 0 {
			root.RunE = cmd.RunE
		}
		root.AddCommand(cmd)
	}
	root.AddCommand(p.configCommand(func() (S, []string, error) { return load(false) }), p.versionCommand())
	return root
}

func (p Program[S]) commandLine(command Command[S], load func(offline bool) (S, []string, error)) *cobra.Command {
	var selected string
	cmd := &cobra.Command{
		Use:   strings.TrimSpace(command.Name + " " + command.Arguments),
		Short: command.Short,
		Long:  strings.TrimSpace(command.Short + ".\n\n" + command.Long),
		RunE: func(cmd *cobra.Command, args []string) error {
			if selected != "" {
				return printCommand(cmd.OutOrStdout(), command, selected, load)
			}
			settings, unknown, err := load(command.Offline)
			if err != nil {
				return err
			}
			return p.run(cmd, args, command, settings, unknown)
		},
	}
	if command.Arguments == "" {
		cmd.Args = p.noArguments
	}
	if command.AddFlags != nil {
		command.AddFlags(cmd.Flags())
	}
	if len(command.Printed) > 0 {
		cmd.Flags().StringVar(&selected, "print", "", "print the SQL without executing it: "+strings.Join(printedNames(command), ", ")+", or all by default")
		cmd.Flags().Lookup("print").NoOptDefVal = printAll
	}
	if len(command.Commands) > 0 {
		cmd.RunE = func(cmd *cobra.Command, _ []string) error {
			return UsageError("%s requires a command; `%s --help` lists the commands", cmd.CommandPath(), cmd.CommandPath())
		}
	}
	for _, sub := range command.Commands {
		cmd.AddCommand(p.commandLine(sub, load))
	}
	return cmd
}

// printAll is the value of --print that selects all parts.
const printAll = "all"

func printedNames[S Settings](command Command[S]) (names []string) {
	for _, part := range command.Printed {
		names = append(names, part.Name)
	}
	return names
}

// printCommand writes the parts that --print selects. If there are several parts, a
// comment with the name precedes each.
func printCommand[S Settings](w io.Writer, command Command[S], selected string, load func(offline bool) (S, []string, error)) error {
	if selected != printAll && !slices.Contains(printedNames(command), selected) {
		return UsageError("--print is %q, must be one of %s", selected, strings.Join(printedNames(command), ", "))
	}
	settings, _, err := load(true)
	if err != nil {
		return err
	}
	for i, part := range command.Printed {
		if selected != printAll && selected != part.Name {
			continue
		}
		if selected == printAll && len(command.Printed) > 1 {
			if _, err := fmt.Fprintf(w, "%s-- For %s (alone: --print=%s).\n\n", strings.Repeat("\n", min(i, 1)), part.Name, part.Name); err != nil {
				return fmt.Errorf("print: %w", err)
			}
		}
		if err := part.Print(w, settings); err != nil {
			return err
		}
	}
	return nil
}

func (p Program[S]) noArguments(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case cmd.HasSubCommands():
		return UsageError("unknown command %q; `%s --help` lists the commands", args[0], cmd.CommandPath())
	default:
		return UsageError("%s accepts no arguments, got %q", cmd.CommandPath(), args[0])
	}
}

// run runs a command with a logger and, if the command has Run, with Sentry and traces.
func (p Program[S]) run(cmd *cobra.Command, args []string, command Command[S], settings S, unknown []string) error {
	ctx := cmd.Context()
	reporting := p.Reporting(settings)
	level, err := telemetry.ParseLevel(reporting.Log.Level)
	if err != nil {
		return err
	}
	log := telemetry.NewLogger(os.Stderr, telemetry.LogOptions{
		Level: level, Format: telemetry.Format(reporting.Log.Format),
	})
	for _, variable := range unknown {
		log.WarnContext(ctx, "unknown environment variable", "variable", variable)
	}
	process := Process{Version: p.Version, Log: log, Args: args, Out: cmd.OutOrStdout()}
	if command.Answer != nil {
		return command.Answer(ctx, process, settings)
	}

	sentry := telemetry.SentryOptions{
		DSN:              reporting.Sentry.DSN,
		Environment:      reporting.Environment,
		Release:          "diehard@" + p.Version,
		TracesSampleRate: reporting.Sentry.TracesSampleRate,
	}
	tracer, stopTraces, err := telemetry.StartTraces(ctx, telemetry.TracesOptions{
		Service:     "diehard-" + p.Name,
		Environment: reporting.Environment,
		Version:     p.Version,
		Log:         log,
		Sentry:      sentry,
	})
	if err != nil {
		return &config.Error{Problem: err.Error()}
	}
	process.Tracer = tracer
	sentry.Spans = tracer != nil
	flush, err := telemetry.StartSentry(sentry)
	if err != nil {
		return err
	}
	defer func() { // at the same time, because each of the two can take 3 seconds
		var group sync.WaitGroup
		group.Go(stopTraces)
		group.Go(flush)
		group.Wait()
	}()

	name := p.Name + " " + command.Name
	log.InfoContext(ctx, "program started", "program", name, "version", p.Version)
	err = command.Run(ctx, process, settings)
	if _, ok := errors.AsType[*config.Error](err); ok {
		return err
	}
	if err != nil {
		log.ErrorContext(ctx, "program failed", "program", name, "err", err)
		return &loggedError{err}
	}
	log.InfoContext(ctx, "program stopped", "program", name)
	return nil
}
