package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"
)

const jsonUsage = "print JSON"

// configCommand returns the command that prints the effective configuration.
func (p Program[S]) configCommand(load func() (S, []string, error)) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the effective configuration with secrets masked",
		Args:  p.noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			settings, unknown, err := load()
			if err != nil {
				return err
			}
			for _, name := range unknown {
				cmd.PrintErrf("%s: unknown environment variable %s\n", p.Name, name)
			}
			if asJSON {
				return settings.WriteJSON(cmd.OutOrStdout())
			}
			return settings.WriteYAML(cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, jsonUsage)
	return cmd
}

// versionCommand returns the command that prints the version and the platform.
func (p Program[S]) versionCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  p.noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return writeVersion(cmd.OutOrStdout(), buildInfo{
				Name: p.Name, Version: p.Version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
			}, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, jsonUsage)
	return cmd
}

type buildInfo struct {
	Name     string `json:"name"`
	Version  string `json:"version"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func writeVersion(w io.Writer, b buildInfo, asJSON bool) error {
	if asJSON {
		if err := json.NewEncoder(w).Encode(b); err != nil {
			return fmt.Errorf("write the version: %w", err)
		}
		return nil
	}
	if _, err := fmt.Fprintf(w, "%s %s (%s, %s)\n", b.Name, b.Version, b.Go, b.Platform); err != nil {
		return fmt.Errorf("write the version: %w", err)
	}
	return nil
}
