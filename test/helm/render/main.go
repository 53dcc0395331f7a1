// Render renders a chart as `helm template` does. It reads values in YAML from stdin, and
// writes the rendered templates to stdout as a JSON object, by the path of the template.
//
//	render CHART RELEASE NAMESPACE
//
// It is a program, so that the suite does not link the libraries of Kubernetes: with the
// race detector, they take minutes to compile.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 3 {
		return errors.New("usage: render CHART RELEASE NAMESPACE")
	}
	chart, err := loader.LoadDir(args[0])
	if err != nil {
		return fmt.Errorf("load the chart: %w", err)
	}
	text, err := io.ReadAll(in)
	if err != nil {
		return fmt.Errorf("read the values: %w", err)
	}
	given, err := chartutil.ReadValues(text)
	if err != nil {
		return fmt.Errorf("read the values: %w", err)
	}
	release := chartutil.ReleaseOptions{Name: args[1], Namespace: args[2], Revision: 1, IsInstall: true}
	values, err := chartutil.ToRenderValues(chart, given, release, nil)
	if err != nil {
		return fmt.Errorf("check the values: %w", err)
	}
	rendered, err := engine.Render(chart, values)
	if err != nil {
		return fmt.Errorf("render the templates: %w", err)
	}
	if err := json.NewEncoder(out).Encode(rendered); err != nil {
		return fmt.Errorf("write the templates: %w", err)
	}
	return nil
}
