package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// healthTimeout is below the timeout of the health checks of containers.
const healthTimeout = 3 * time.Second

// Health returns the command health, which asks the running program for its readiness. The
// images have no shell and no HTTP client, so their health check is this command. addr
// returns admin.addr.
func Health[S Settings](addr func(S) string) Command[S] {
	return Command[S]{
		Name: "health", Short: "Ask the running program whether it is ready, for health checks",
		Long: "It requests /readyz at admin.addr of the configuration, prints the result in one line, " +
			"and exits with 1 if the program is not ready or does not respond within 3 seconds. " +
			"It needs only admin.addr, which must be that of the running program.",
		Offline: true,
		Answer: func(ctx context.Context, p Process, settings S) error {
			if err := checkReady(ctx, addr(settings)); err != nil {
				return err
			}
			_, _ = fmt.Fprintln(p.Out, "ready")
			return nil
		},
	}
}

func checkReady(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	ready := url.URL{Scheme: "http", Host: reachable(addr), Path: "/readyz"}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, ready.String(), http.NoBody)
	if err != nil {
		return fmt.Errorf("admin.addr: %w", err)
	}
	direct := http.Client{Transport: &http.Transport{}} // without the proxy of the environment
	response, err := direct.Do(request)
	if err != nil {
		return fmt.Errorf("not running: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusOK {
		return nil
	}
	var body struct {
		Checks map[string]struct {
			Error string `json:"error"`
		} `json:"checks"`
	}
	if err := json.NewDecoder(response.Body).Decode(&body); err != nil {
		return fmt.Errorf("not ready: %s", response.Status)
	}
	var failed []string
	for name, check := range body.Checks {
		if check.Error != "" {
			failed = append(failed, name+": "+check.Error)
		}
	}
	slices.Sort(failed)
	return errors.New("not ready: " + strings.Join(failed, "; "))
}

// reachable returns the address at which a listener of this machine can be reached.
func reachable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	return net.JoinHostPort(host, port)
}
