// Package cli is what the command lines of the programs have in common: how
// they load their configuration, report, and end.
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
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/diehard-outbox/diehard/pkg/config"
	"github.com/diehard-outbox/diehard/pkg/telemetry"
)

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2 // the command line or the configuration is wrong
)

// Settings are a program's configuration.
type Settings interface {
	WriteYAML(w io.Writer) error
	WriteJSON(w io.Writer) error
}

// Program is one of Diehard's programs. Beside its own commands it has config
// and version.
type Program[S Settings] struct {
	Name, Short string
	// Version is the one that the linker set. Without one, Main takes the
	// version of the module that the go command recorded.
	Version string

	// AddFlags adds a flag for each key of the configuration, and Load reads
	// it; both are package config's.
	AddFlags func(*pflag.FlagSet)
	Load     func(config.LoadOptions) (S, []string, error)
	// Reporting returns how the configured program reports.
	Reporting func(S) Reporting

	// Commands do the program's work. The first is run where none is named.
	Commands []Command[S]
}

// Reporting is the part of a configuration that says where logs and errors go.
type Reporting struct {
	Environment string
	Log         config.Log
	Sentry      config.Sentry
}

// Command does a program's work, answers its operator, or is the name that
// other commands have in common: it has Run, Answer or Commands.
type Command[S Settings] struct {
	Name, Short string
	// Long is what its help says more than Short.
	Long string

	// Run returns when the work is done, or when ctx ends because the program
	// was told to stop. What it returns is logged; a *config.Error is printed.
	Run func(ctx context.Context, p Process, settings S) error

	// Answer writes its answer to p.Out and returns. What it returns is printed,
	// in one line, and neither its start nor its end is logged.
	Answer func(ctx context.Context, p Process, settings S) error
	// Arguments are what Answer takes, for its help: ID...; empty is none.
	Arguments string
	// AddFlags adds Answer's own flags, which hide those of the configuration
	// that have the same name; nil is none.
	AddFlags func(*pflag.FlagSet)

	// Printed is what Run would have the databases execute. It adds the flag --print,
	// with which nothing is executed and no database is needed.
	Printed []Printed[S]

	Commands []Command[S]
}

// Printed is one database's part of what a command executes.
type Printed[S Settings] struct {
	// Name is the value of --print that selects it.
	Name  string
	Print func(w io.Writer, settings S) error
}

// Process is the program as it runs.
type Process struct {
	Version string
	Log     *slog.Logger
	// Args and Out are for a command that answers.
	Args []string
	Out  io.Writer
}

// Main runs the command line of the process and returns its exit code.
func (p Program[S]) Main() int {
	info, _ := debug.ReadBuildInfo()
	p.Version = version(p.Version, info)

	// The first signal asks the program to stop, the second ends it.
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

// usageError is a command line that cannot be understood.
type usageError struct{ error }

// UsageError returns an error that says what is wrong with the command line.
func UsageError(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// loggedError is an error that the log has already.
type loggedError struct{ error }

func (p Program[S]) command() *cobra.Command {
	root := &cobra.Command{
		Use:           p.Name,
		Short:         p.Short,
		Long:          p.Short + ".\n\nWithout a command it runs `" + p.Name + " " + p.Commands[0].Name + "`.",
		Args:          p.noArguments,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	// Flags of the configuration go with every command that reads it.
	file := root.PersistentFlags().String("config", "", "YAML file to read the configuration from")
	p.AddFlags(root.PersistentFlags())

	// Not the command's own flags, of which one may have the name of a key.
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
			settings, unknown, err := load(false)
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
		cmd.Flags().StringVar(&selected, "print", "", "print the SQL and execute nothing: "+strings.Join(printedNames(command), ", ")+"; without a value all of it")
		cmd.Flags().Lookup("print").NoOptDefVal = printAll
	}
	if len(command.Commands) > 0 {
		cmd.RunE = func(cmd *cobra.Command, _ []string) error {
			return UsageError("%s needs a command; `%s --help` lists them", cmd.CommandPath(), cmd.CommandPath())
		}
	}
	for _, sub := range command.Commands {
		cmd.AddCommand(p.commandLine(sub, load))
	}
	return cmd
}

// printAll is the value of --print that selects all of it.
const printAll = "all"

func printedNames[S Settings](command Command[S]) (names []string) {
	for _, part := range command.Printed {
		names = append(names, part.Name)
	}
	return names
}

// printCommand writes the parts that --print selects, each behind a comment with its
// name if there are several.
func printCommand[S Settings](w io.Writer, command Command[S], selected string, load func(offline bool) (S, []string, error)) error {
	if selected != printAll && !slices.Contains(printedNames(command), selected) {
		return UsageError("--print is %q, and has to be one of %s", selected, strings.Join(printedNames(command), ", "))
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
		return UsageError("there is no command %q; `%s --help` lists them", args[0], cmd.CommandPath())
	default:
		return UsageError("%s takes no argument, and got %q", cmd.CommandPath(), args[0])
	}
}

// run runs a command with its log and, where it does the program's work, with
// Sentry.
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
		log.WarnContext(ctx, "an environment variable looks like configuration and is none", "variable", variable)
	}
	process := Process{Version: p.Version, Log: log, Args: args, Out: cmd.OutOrStdout()}
	if command.Answer != nil {
		return command.Answer(ctx, process, settings)
	}

	flush, err := telemetry.StartSentry(telemetry.SentryOptions{
		DSN:              reporting.Sentry.DSN,
		Environment:      reporting.Environment,
		Release:          "diehard@" + p.Version,
		TracesSampleRate: reporting.Sentry.TracesSampleRate,
	})
	if err != nil {
		return err
	}
	defer flush()

	name := p.Name + " " + command.Name
	log.InfoContext(ctx, "program starts", "program", name, "version", p.Version)
	err = command.Run(ctx, process, settings)
	if _, ok := errors.AsType[*config.Error](err); ok {
		return err
	}
	if err != nil {
		log.ErrorContext(ctx, "program failed", "program", name, "err", err)
		return &loggedError{err}
	}
	log.InfoContext(ctx, "program ends", "program", name)
	return nil
}
