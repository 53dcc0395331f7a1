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
	// Version is the build's.
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

// Command does a program's work.
type Command[S Settings] struct {
	Name, Short string
	// Run returns when the work is done, or when ctx ends because the program
	// was told to stop. What it returns is logged; a *config.Error is printed.
	Run func(ctx context.Context, p Process, settings S) error
}

// Process is the program as it runs.
type Process struct {
	Version string
	Log     *slog.Logger
}

// Main runs the command line of the process and returns its exit code.
func (p Program[S]) Main() int {
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

	load := func(cmd *cobra.Command) (S, []string, error) {
		return p.Load(config.LoadOptions{File: *file, Flags: cmd.Flags()})
	}
	for i, command := range p.Commands {
		run := func(cmd *cobra.Command, _ []string) error {
			settings, unknown, err := load(cmd)
			if err != nil {
				return err
			}
			return p.run(cmd.Context(), command, settings, unknown)
		}
		if i == 0 {
			root.RunE = run
		}
		root.AddCommand(&cobra.Command{Use: command.Name, Short: command.Short, Args: p.noArguments, RunE: run})
	}
	root.AddCommand(p.configCommand(load), p.versionCommand())
	return root
}

func (p Program[S]) noArguments(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if cmd.HasParent() {
		return &usageError{fmt.Errorf("%s takes no argument, and got %q", cmd.CommandPath(), args[0])}
	}
	return &usageError{fmt.Errorf("there is no command %q; `%s --help` lists them", args[0], p.Name)}
}

// run runs a command with its log and Sentry.
func (p Program[S]) run(ctx context.Context, command Command[S], settings S, unknown []string) error {
	reporting := p.Reporting(settings)
	level, err := telemetry.ParseLevel(reporting.Log.Level)
	if err != nil {
		return err
	}
	log := telemetry.NewLogger(os.Stderr, telemetry.LogOptions{
		Level: level, Format: telemetry.Format(reporting.Log.Format),
	})
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

	for _, variable := range unknown {
		log.WarnContext(ctx, "an environment variable looks like configuration and is none", "variable", variable)
	}
	name := p.Name + " " + command.Name
	log.InfoContext(ctx, "program starts", "program", name, "version", p.Version)
	err = command.Run(ctx, Process{Version: p.Version, Log: log}, settings)
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
