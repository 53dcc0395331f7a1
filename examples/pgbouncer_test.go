package examples_test

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/internal/ports"
)

// findPgBouncer returns the installed PgBouncer. If none is installed, it unpacks
// Debian's package.
func findPgBouncer(ctx context.Context) program {
	GinkgoHelper()
	if path, err := exec.LookPath("pgbouncer"); err == nil {
		return program{Path: path}
	}
	if dir, ok := unpack(ctx, "pgbouncer", "pgbouncer", "libc-ares2", "libevent-2.1-7"); ok {
		libraries, err := filepath.Glob(filepath.Join(dir, "usr", "lib", "*-linux-gnu"))
		Expect(err).NotTo(HaveOccurred())
		p := program{
			Path: filepath.Join(dir, "usr", "sbin", "pgbouncer"),
			Env:  []string{"LD_LIBRARY_PATH=" + strings.Join(libraries, ":")},
		}
		output, err := p.command(ctx, "--version").CombinedOutput()
		if err == nil {
			return p
		}
		GinkgoWriter.Printf("%s: %v: %s", p.Path, err, output)
	}
	return program{Missing: "PgBouncer is missing: install it from your package manager (Debian: apt install pgbouncer)"}
}

// startPgBouncer starts a PgBouncer in transaction mode, which runs until the end of
// the spec. Its clients share one connection to the server. It returns the DSN by
// which a client reaches the database through PgBouncer.
func startPgBouncer(ctx context.Context, dsn string) string {
	GinkgoHelper()
	server, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	password, _ := server.User.Password()
	quoted := func(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }
	address := ports.Reserve()
	_, port, err := net.SplitHostPort(address)
	Expect(err).NotTo(HaveOccurred())
	config := filepath.Join(GinkgoT().TempDir(), "pgbouncer.ini")
	Expect(os.WriteFile(config, fmt.Appendf(nil, `
[databases]
* = host=%s port=%s user=%s password=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %s
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 1
`, quoted(server.Hostname()), quoted(server.Port()), quoted(server.User.Username()), quoted(password), port), 0o600)).To(Succeed())

	cmd := prepared().PgBouncer.command(context.WithoutCancel(ctx), config)
	if os.Geteuid() == 0 { // PgBouncer refuses to run as root
		cmd.Args = []string{cmd.Path, "--user", "nobody", config}
	}
	cmd.Stdout, cmd.Stderr = GinkgoWriter, GinkgoWriter
	Expect(cmd.Start()).To(Succeed())
	DeferCleanup(func() {
		Expect(cmd.Process.Kill()).To(Succeed())
		_ = cmd.Wait() // returns the error of a killed process
	})

	server.Host = address
	Eventually(func() error {
		connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", server.Host)
		if err == nil {
			err = connection.Close()
		}
		return err
	}).WithTimeout(time.Minute).Should(Succeed())
	return server.String()
}
