package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/engines"
)

// fetchCommand is for a machine that will be offline, or a cache to be warmed.
func fetchCommand() *cobra.Command {
	var verify bool
	cmd := &cobra.Command{
		Use:   "fetch",
		Short: "Get the database engines into the cache, and say where",
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
			return err //nolint:wrapcheck // the terminal's
		},
	}
	cmd.Flags().BoolVar(&verify, "verify", false, "read every file that is in the cache, and fetch again what is damaged")
	return cmd
}
