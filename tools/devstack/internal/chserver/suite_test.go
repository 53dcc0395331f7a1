package chserver_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chserver"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/engines"
)

func TestServer(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "ClickHouse Server Suite")
}

// childEnv turns the test binary into a server. A server that a test kills must
// be another process, and a process can have only one engine.
const childEnv = "CHSERVER_TEST_CHILD_DATA"

func TestMain(m *testing.M) {
	if dataDir := os.Getenv(childEnv); dataDir != "" {
		if err := serveChild(dataDir); err != nil {
			_, _ = fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serveChild prints its two addresses and serves until SIGTERM.
func serveChild(dataDir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	server, err := chserver.New(chserver.Options{Library: os.Getenv(libraryEnv), DataDir: dataDir})
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(os.Stdout, server.HTTPAddr(), server.NativeAddr()); err != nil {
		return err
	}
	return server.Serve(ctx)
}

// libraryEnv passes the library to a child.
const libraryEnv = "CHSERVER_TEST_LIBRARY"

const (
	user     = "tester"
	password = "s3cret&?"
)

// The engine of this process and its library.
var (
	server  *chserver.Server
	library string
)

var _ = SynchronizedBeforeSuite(func(ctx context.Context) []byte {
	found, err := engines.Fetch(ctx, engines.Options{Progress: GinkgoWriter})
	Expect(err).NotTo(HaveOccurred())
	path, err := found.ClickHouseLib()
	Expect(err).NotTo(HaveOccurred())
	return []byte(path)
}, func(path []byte) {
	library = string(path)
	var err error
	server, err = chserver.New(chserver.Options{
		Library:  library,
		DataDir:  GinkgoT().TempDir(),
		User:     user,
		Password: password,
		Log:      slog.New(slog.NewTextHandler(GinkgoWriter, nil)),
	})
	Expect(err).NotTo(HaveOccurred())

	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx) }()
	DeferCleanup(func() {
		cancel()
		Eventually(served).WithTimeout(30 * time.Second).Should(Receive(BeNil()))
	})
})

// options returns the options of clickhouse-go for the server of this process.
func options(protocol clickhouse.Protocol) *clickhouse.Options {
	address := server.NativeAddr()
	if protocol == clickhouse.HTTP {
		address = server.HTTPAddr()
	}
	return &clickhouse.Options{
		Protocol: protocol,
		Addr:     []string{address},
		Auth:     clickhouse.Auth{Username: user, Password: password},
	}
}

func open(o *clickhouse.Options) driver.Conn {
	conn, err := clickhouse.Open(o)
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(conn.Close)
	return conn
}

// openSession returns a client that uses only one connection at a time. The connection
// stays the same, except after a query for one row: the driver returns it to its pool late.
func openSession(protocol clickhouse.Protocol) driver.Conn {
	o := options(protocol)
	o.MaxOpenConns = 1
	return open(o)
}

var names atomic.Int64

// newName returns a unique name for a table or a database.
func newName(prefix string) string {
	return fmt.Sprintf("%s_%d_%d", prefix, os.Getpid(), names.Add(1))
}

// eachProtocol describes specs for both protocols.
func eachProtocol(text string, specs func(protocol clickhouse.Protocol)) bool { //nolint:unparam // for the package level
	for _, protocol := range []clickhouse.Protocol{clickhouse.Native, clickhouse.HTTP} {
		Describe(strings.ToUpper(protocol.String())+": "+text, func() { specs(protocol) })
	}
	return true
}
