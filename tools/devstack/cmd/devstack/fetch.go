package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/engines"
)

// fetchCommand fills the cache, for example before the machine goes offline.
func fetchCommand() *cobra.Command {
	var verify bool
	cmd := &cobra.Command{
		Use:   "fetch",
		Short: "Download the database engines into the cache, and print its path",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fetched, err := engines.Fetch(cmd.Context(), engines.Options{Progress: os.Stderr, Verify: verify})
			if err != nil {
				return err
			}
			if versions := fetched.Versions(); len(versions) > 0 {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s in %s\n", strings.Join(versions, ", "), fetched.Dir())
			} else {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), "no engines are pinned for this platform")
			}
			return err //nolint:wrapcheck // an error of the terminal
		},
	}
	cmd.Flags().BoolVar(&verify, "verify", false, "check every file in the cache, and download damaged files again")
	return cmd
}
