package main

import (
	"context"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/engines"
)

// chromiumCommand prints the path of a browser, as fetchCommand does for the
// engines.
func chromiumCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "chromium",
		Short: "Print the path of a Chromium browser, and download the browser if none is installed",
		Long: "Print the path of a Chromium browser: the browser that " + engines.ChromiumEnv + " names, an\n" +
			"installed browser, or a headless browser that is downloaded into the cache (Linux on x64 only).",
		Args: cobra.NoArgs,
		RunE: printPath(engines.Chromium),
	}
}

// axeCommand prints the path of the script that checks pages for accessibility.
func axeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "axe",
		Short: "Print the path of the script axe-core, and download it if the cache lacks it",
		Args:  cobra.NoArgs,
		RunE:  printPath(engines.Axe),
	}
}

func printPath(find func(context.Context, engines.Options) (string, error)) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		path, err := find(cmd.Context(), engines.Options{Progress: os.Stderr})
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(cmd.OutOrStdout(), path)
		return err //nolint:wrapcheck // an error of the terminal
	}
}
