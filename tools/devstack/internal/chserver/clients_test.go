package chserver_test

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
	"github.com/diehard-outbox/diehard/tools/devstack/internal/chserver"
)

const patience = time.Minute

var _ = eachProtocol("clients", func(protocol clickhouse.Protocol) {
	// running counts the queries that contain the mark.
	running := func(ctx context.Context, mark string) int {
		GinkgoHelper()
		var n int
		_, err := fmt.Sscan(query(ctx, "SELECT count() FROM system.processes WHERE query LIKE '%"+mark+"%' AND query NOT LIKE '%system.processes%'"), &n)
		Expect(err).NotTo(HaveOccurred())
		return n
	}
	// slow returns a query that runs for minutes unless it is canceled.
	slow := func(mark string) string {
		return "SELECT sum(sleepEachRow(0.1)) FROM numbers(3000) WHERE '" + mark + "' != '' SETTINGS max_block_size = 1, function_sleep_max_microseconds_per_block = 0"
	}

	It("run concurrently, and their queries end when they disconnect", func(ctx SpecContext) {
		mark := newName("mark")
		working, giveUp := context.WithCancel(ctx)
		var group sync.WaitGroup
		for range 4 {
			group.Go(func() {
				defer GinkgoRecover()
				var sum uint64
				Expect(open(options(protocol)).QueryRow(working, slow(mark)).Scan(&sum)).NotTo(Succeed())
			})
		}
		Eventually(ctx, running).WithArguments(ctx, mark).WithTimeout(patience).Should(Equal(4))
		giveUp()
		group.Wait()
		Eventually(ctx, running).WithArguments(ctx, mark).WithTimeout(patience).Should(BeZero())
	})

	It("get errors with ClickHouse's codes, and can continue after an error", func(ctx SpecContext) {
		conn := open(options(protocol))
		for range 2 {
			exception, ok := errors.AsType[*clickhouse.Exception](conn.Exec(ctx, "SELECT * FROM no_such_table"))
			Expect(ok).To(BeTrue())
			Expect(exception.Code).To(Equal(int32(60)))
			var one uint8
			Expect(conn.QueryRow(ctx, "SELECT 1").Scan(&one)).To(Succeed())
		}
	})

	It("send parameters and settings that apply to one query only", func(ctx SpecContext) {
		conn := openSession(protocol)
		var name, threads string
		Expect(conn.QueryRow(clickhouse.Context(ctx,
			clickhouse.WithParameters(clickhouse.Parameters{"name": `it's \ "x"`}),
			clickhouse.WithSettings(clickhouse.Settings{"max_threads": 3})),
			"SELECT {name:String}, toString(getSetting('max_threads'))").Scan(&name, &threads)).To(Succeed())
		Expect(name).To(Equal(`it's \ "x"`))
		Expect(threads).To(Equal("3"))
		Expect(conn.QueryRow(ctx, "SELECT toString(getSetting('max_threads'))").Scan(&threads)).To(Succeed())
		Expect(threads).NotTo(Equal("3"))
	})

	It("see the columns of a result without rows", func(ctx SpecContext) {
		rows, err := open(options(protocol)).Query(ctx, "SELECT 1 AS a, 'x' AS b WHERE 0")
		Expect(err).NotTo(HaveOccurred())
		defer rows.Close()
		Expect(rows.Next()).To(BeFalse())
		Expect(rows.Err()).NotTo(HaveOccurred())
		if protocol == clickhouse.Native { // over HTTP the driver reads the columns from the first block only
			Expect(rows.Columns()).To(Equal([]string{"a", "b"}))
		}
	})

	It("are refused if the password is wrong", func(ctx SpecContext) {
		o := options(protocol)
		o.Auth.Password = "guess"
		err := open(o).Ping(ctx)
		Expect(err).To(MatchError(ContainSubstring("516")))
		Expect(err.Error()).NotTo(ContainSubstring("guess"))
	})

	It("leave no rows when they disconnect during an insert", func(ctx SpecContext) {
		table := newTable(ctx)
		batch, err := open(options(protocol)).PrepareBatch(ctx, "INSERT INTO "+table)
		Expect(err).NotTo(HaveOccurred())
		Expect(batch.Append(uint64(1), "x")).To(Succeed())
		Expect(batch.Abort()).To(Succeed())
		Expect(query(ctx, "SELECT count() FROM "+table)).To(Equal("0\n"))
	})
})

var _ = Describe("The native protocol", func() {
	It("gives each client its own session", func(ctx SpecContext) {
		// The driver's own pool may open a second connection before the query for a row has
		// returned the first. A connection of database/sql stays the same.
		pinned := func() *sql.Conn {
			GinkgoHelper()
			db := clickhouse.OpenDB(options(clickhouse.Native))
			DeferCleanup(db.Close)
			conn, err := db.Conn(ctx)
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(conn.Close)
			return conn
		}
		run := func(conn *sql.Conn, statement string) error {
			_, err := conn.ExecContext(ctx, statement)
			return err
		}
		one, other := pinned(), pinned()
		Expect(run(one, "CREATE TEMPORARY TABLE mine (n UInt8)")).To(Succeed())
		Expect(run(one, "SET max_threads = 3")).To(Succeed())
		Expect(run(one, "USE system")).To(Succeed())

		var database, threads string
		ask := func(conn *sql.Conn) error {
			return conn.QueryRowContext(ctx, "SELECT currentDatabase(), toString(getSetting('max_threads'))").Scan(&database, &threads)
		}
		Expect(ask(one)).To(Succeed())
		Expect(database + " " + threads).To(Equal("system 3"))
		Expect(run(one, "INSERT INTO mine VALUES (1)")).To(Succeed())
		Expect(ask(other)).To(Succeed())
		Expect(database).To(Equal("default"))
		Expect(threads).NotTo(Equal("3"))
		Expect(run(other, "SELECT * FROM mine")).To(MatchError(ContainSubstring("code: 60")))
	})

	It("applies settings to one INSERT, but the settings in the INSERT take precedence", func(ctx SpecContext) {
		table := newName("tokens")
		query(ctx, "CREATE TABLE "+table+" (n UInt64, s String) ENGINE = MergeTree ORDER BY n SETTINGS non_replicated_deduplication_window = 100")
		conn := openSession(clickhouse.Native)
		insert := func(text, token string) error {
			settings := clickhouse.Settings{"insert_deduplicate": 1, "insert_deduplication_token": token}
			return conn.Exec(clickhouse.Context(ctx, clickhouse.WithSettings(settings)), "INSERT INTO "+table+text)
		}
		for n, same := range []struct{ text, first, second string }{
			{" VALUES (%d, 'x')", "a", "a"},
			{" (n, s) SETTINGS insert_deduplication_token = 'own' VALUES (%d, 'x')", "b", "c"},
			{" (n) -- a comment\nFORMAT Values (%d)", "d", "d"},
		} {
			By(same.text)
			Expect(insert(fmt.Sprintf(same.text, 10*n), same.first)).To(Succeed())
			Expect(insert(fmt.Sprintf(same.text, 10*n+1), same.second)).To(Succeed())
			Expect(query(ctx, fmt.Sprintf("SELECT n FROM %s WHERE n >= %d", table, 10*n))).To(Equal(fmt.Sprint(10*n, "\n")))
		}

		By("without settings")
		Expect(conn.Exec(ctx, "INSERT INTO "+table+" VALUES (100, 'x')")).To(Succeed())
		Expect(conn.Exec(ctx, "INSERT INTO "+table+" VALUES (101, 'x')")).To(Succeed())
		Expect(query(ctx, "SELECT n FROM "+table+" WHERE n >= 100 ORDER BY n")).To(Equal("100\n101\n"))

		By("refusing an unknown setting")
		unknown := clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{"max_sped": 1}))
		_, err := conn.PrepareBatch(unknown, "INSERT INTO "+table)
		Expect(err).To(MatchError(ContainSubstring("code: 115")))
		Expect(conn.Exec(ctx, "INSERT INTO "+table+" VALUES (102, 'x')")).To(Succeed())
	})

	It("returns the current columns of a table", func(ctx SpecContext) {
		table := newName("changing")
		query(ctx, "CREATE TABLE "+table+" (a UInt8) ENGINE = MergeTree ORDER BY a")
		conn := openSession(clickhouse.Native)
		columns := func() (names []string) {
			batch, err := conn.PrepareBatch(ctx, "INSERT INTO "+table)
			Expect(err).NotTo(HaveOccurred())
			for _, c := range batch.Columns() {
				names = append(names, c.Name()+" "+string(c.Type()))
			}
			Expect(batch.Send()).To(Succeed()) // Abort would close the connection
			return names
		}
		Expect(columns()).To(Equal([]string{"a UInt8"}))
		Expect(columns()).To(Equal([]string{"a UInt8"}))

		By("after a change by another client over HTTP")
		query(ctx, "ALTER TABLE "+table+" ADD COLUMN b String")
		Expect(columns()).To(Equal([]string{"a UInt8", "b String"}))

		By("after a change by another client over the native protocol")
		Expect(open(options(clickhouse.Native)).Exec(ctx, "ALTER TABLE "+table+" DROP COLUMN b")).To(Succeed())
		Expect(columns()).To(Equal([]string{"a UInt8"}))

		By("in another database")
		database := newName("other")
		query(ctx, "CREATE DATABASE "+database)
		query(ctx, "CREATE TABLE "+database+"."+table+" (c UInt8) ENGINE = Memory")
		Expect(columns()).To(Equal([]string{"a UInt8"}))
		Expect(conn.Exec(ctx, "USE "+database)).To(Succeed())
		Expect(columns()).To(Equal([]string{"c UInt8"}))
	})

	It("reports the right port to a browser", func(ctx SpecContext) {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+server.NativeAddr(), http.NoBody)
		Expect(err).NotTo(HaveOccurred())
		response, err := http.DefaultClient.Do(request)
		Expect(err).NotTo(HaveOccurred())
		defer response.Body.Close()
		Expect(response.StatusCode).To(Equal(http.StatusBadRequest))
	})

	It("survives invalid packets", func(ctx SpecContext) {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", server.NativeAddr())
		Expect(err).NotTo(HaveOccurred())
		_, err = conn.Write([]byte(strings.Repeat("\xff", 100)))
		Expect(err).NotTo(HaveOccurred())
		Expect(conn.Close()).To(Succeed())
		Expect(open(options(clickhouse.Native)).Ping(ctx)).To(Succeed())
	})
})

// child is a server in its own process.
type child struct {
	cmd          *exec.Cmd
	http, native string
}

func startChild(ctx context.Context, dataDir string) *child {
	GinkgoHelper()
	c := &child{cmd: exec.CommandContext(context.WithoutCancel(ctx), os.Args[0])} //nolint:gosec // this test binary
	c.cmd.Env = append(os.Environ(), childEnv+"="+dataDir, libraryEnv+"="+library)
	c.cmd.Stderr = GinkgoWriter
	stdout, err := c.cmd.StdoutPipe()
	Expect(err).NotTo(HaveOccurred())
	Expect(c.cmd.Start()).To(Succeed())
	DeferCleanup(c.kill)
	line, err := bufio.NewReader(stdout).ReadString('\n')
	Expect(err).NotTo(HaveOccurred())
	_, err = fmt.Sscan(line, &c.http, &c.native)
	Expect(err).NotTo(HaveOccurred(), line)
	return c
}

// kill ends the server like a power cut.
func (c *child) kill() {
	if c.cmd.ProcessState == nil {
		_ = c.cmd.Process.Signal(syscall.SIGKILL)
		_ = c.cmd.Wait()
	}
}

func (c *child) open(protocol clickhouse.Protocol) driver.Conn {
	o := &clickhouse.Options{Protocol: protocol, Addr: []string{c.native}}
	if protocol == clickhouse.HTTP {
		o.Addr = []string{c.http}
	}
	return open(o)
}

var _ = eachProtocol("a data folder", func(protocol clickhouse.Protocol) {
	var dir string
	BeforeEach(func() { dir = filepath.Join(GinkgoT().TempDir(), "with a space") })

	It("keeps every acknowledged insert, and no incomplete insert, after a kill", func(ctx SpecContext) {
		const rows = 1000
		first := startChild(ctx, dir)
		conn := first.open(protocol)
		Expect(conn.Exec(ctx, "CREATE TABLE t (batch UInt64, n UInt64) ENGINE = MergeTree ORDER BY n "+
			"SETTINGS non_replicated_deduplication_window = 1000, fsync_after_insert = 1, fsync_part_directory = 1")).To(Succeed())
		insert := func(conn driver.Conn, n uint64) error {
			batch, err := conn.PrepareBatch(clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{
				"insert_deduplicate": 1, "insert_deduplication_token": fmt.Sprint("batch-", n),
			})), "INSERT INTO t")
			if err != nil {
				return err
			}
			for i := range uint64(rows) {
				if err := batch.Append(n, i); err != nil {
					return err
				}
			}
			return batch.Send()
		}

		acknowledged := make(chan uint64, 1)
		working := make(chan struct{})
		go func() {
			defer GinkgoRecover()
			for n := uint64(0); ; n++ {
				if n == 10 {
					close(working)
				}
				if insert(conn, n) != nil {
					acknowledged <- n
					return
				}
			}
		}()
		Eventually(ctx, working).WithTimeout(patience).Should(BeClosed())
		first.kill()
		var count uint64
		Eventually(ctx, acknowledged).WithTimeout(patience).Should(Receive(&count))

		again := startChild(ctx, dir).open(protocol)
		var batches, all, whole uint64
		Expect(again.QueryRow(ctx, `SELECT count(), sum(c), countIf(c = 1000 AND d = 1000)
			FROM (SELECT batch, count() AS c, uniqExact(n) AS d FROM t GROUP BY batch)`).Scan(&batches, &all, &whole)).To(Succeed())
		Expect(batches).To(BeElementOf(count, count+1), "the last insert may be complete but unacknowledged")
		Expect(whole).To(Equal(batches))
		Expect(all).To(Equal(batches * rows))

		By("checking that the server remembers the tokens")
		Expect(insert(again, 0)).To(Succeed())
		var after uint64
		Expect(again.QueryRow(ctx, "SELECT count() FROM t").Scan(&after)).To(Succeed())
		Expect(after).To(Equal(all))
	})

	It("cannot be opened by a second server", func(ctx SpecContext) {
		first := startChild(ctx, dir)
		Expect(first.open(protocol).Ping(ctx)).To(Succeed())
		_, err := chserver.New(chserver.Options{Library: library, DataDir: dir})
		_, ok := errors.AsType[*chengine.InUseError](err)
		Expect(ok).To(BeTrue(), "%v", err)
		Expect(err).To(MatchError(ContainSubstring("is in use by another ClickHouse")))
		Expect(first.open(protocol).Ping(ctx)).To(Succeed())
	})
})
