package integration_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/postgres"
	"github.com/diehard-outbox/diehard/test/programs"
	"github.com/diehard-outbox/diehard/test/system"
	"github.com/diehard-outbox/diehard/tools/devstack"
)

// authority signs certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(name string) authority {
	GinkgoHelper()
	template := x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	Expect(err).NotTo(HaveOccurred())
	encoded, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	Expect(err).NotTo(HaveOccurred())
	certificate, err := x509.ParseCertificate(encoded)
	Expect(err).NotTo(HaveOccurred())
	return authority{certificate, key}
}

// write writes the certificate of the authority.
func (a authority) write(path string) {
	GinkgoHelper()
	Expect(os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.certificate.Raw}), 0o600)).To(Succeed())
}

// issue writes a certificate and its key, path.crt and path.key. It is valid until the end.
func (a authority) issue(path, name string, end time.Time, addresses ...net.IP) {
	GinkgoHelper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	Expect(err).NotTo(HaveOccurred())
	encoded, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, IPAddresses: addresses, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: end, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.certificate, key.Public(), a.key)
	Expect(err).NotTo(HaveOccurred())
	private, err := x509.MarshalPKCS8PrivateKey(key)
	Expect(err).NotTo(HaveOccurred())
	Expect(os.WriteFile(path+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: encoded}), 0o600)).To(Succeed())
	Expect(os.WriteFile(path+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600)).To(Succeed())
}

func withUser(dsn, name string) string {
	GinkgoHelper()
	return changed(dsn, func(u *url.URL) { u.User = url.User(name) })
}

var _ = Describe("TLS to PostgreSQL", Ordered, func() {
	var (
		s         *system.System
		own       *system.Private
		folder    string
		ca, other authority
		tomorrow  = time.Now().Add(24 * time.Hour)
		expired   = time.Now().Add(-time.Minute)
		loopback  = net.IPv4(127, 0, 0, 1)
	)

	// serve gives the server a certificate.
	serve := func(ctx context.Context, a authority, name string, end time.Time, addresses ...net.IP) {
		GinkgoHelper()
		dir := own.Postgres.DataDir()
		a.issue(filepath.Join(dir, "server"), name, end, addresses...)
		ca.write(filepath.Join(dir, "clients.crt"))
		info, err := os.Stat(dir)
		Expect(err).NotTo(HaveOccurred())
		owner, ok := info.Sys().(*syscall.Stat_t)
		Expect(ok).To(BeTrue())
		for _, file := range []string{"server.crt", "server.key", "clients.crt"} {
			Expect(os.Chown(filepath.Join(dir, file), int(owner.Uid), int(owner.Gid))).To(Succeed())
		}
		s.Postgres.MustExecContext(ctx, "SELECT pg_reload_conf()")
	}

	BeforeAll(func(ctx SpecContext) {
		own = system.StartPrivate(ctx, devstack.PostgresOptions{}, devstack.ClickHouseOptions{})
		s = system.New(suite.Prepared(), own.PostgresDSN, own.ClickHouseDSNs)
		folder = GinkgoT().TempDir()
		ca, other = newAuthority("authority"), newAuthority("another authority")
		ca.write(filepath.Join(folder, "ca.crt"))
		other.write(filepath.Join(folder, "other.crt"))
		ca.issue(filepath.Join(folder, "client"), "certified", tomorrow)
		ca.issue(filepath.Join(folder, "expired"), "certified", expired)
		other.issue(filepath.Join(folder, "foreign"), "certified", tomorrow)
		s.Postgres.MustExecContext(ctx, "CREATE ROLE certified LOGIN SUPERUSER")
		hba := filepath.Join(own.Postgres.DataDir(), "pg_hba.conf")
		rules, err := os.ReadFile(hba)
		Expect(err).NotTo(HaveOccurred())
		Expect(os.WriteFile(hba, append([]byte("hostssl all certified all cert\nhostnossl all certified all reject\n"), rules...), 0o600)).To(Succeed())
		serve(ctx, ca, "db.example.com", tomorrow, loopback)
		for _, setting := range []string{"ssl = on", "ssl_ca_file = 'clients.crt'"} {
			s.Postgres.MustExecContext(ctx, "ALTER SYSTEM SET "+setting)
		}
		s.Postgres.MustExecContext(ctx, "SELECT pg_reload_conf()")
		Eventually(func() error {
			db, err := postgres.Open(postgres.Options{DSN: withParameter(own.PostgresDSN, "sslmode", "require")})
			if err != nil {
				return err
			}
			defer db.Close()
			return db.PingContext(ctx)
		}).WithTimeout(patience).Should(Succeed())
	})

	// dsn returns the DSN of the server with the parameters, names and values. A value that
	// ends in .crt or .key is a file of the folder.
	dsn := func(parameters ...string) string {
		GinkgoHelper()
		result := own.PostgresDSN
		for i := 0; i < len(parameters); i += 2 {
			value := parameters[i+1]
			if ext := filepath.Ext(value); ext == ".crt" || ext == ".key" {
				value = filepath.Join(folder, value)
			}
			if parameters[i] == "user" {
				result = withUser(result, value)
				continue
			}
			result = withParameter(result, parameters[i], value)
		}
		return result
	}
	check := func(code int, dsn string) string {
		GinkgoHelper()
		p := programs.Run(suite.Prepared(), "relay", []string{"check"}, checkEnv(dsn, own.ClickHouseDSNs.Native)...)
		p.EndsWith(code)
		return string(p.Out.Contents())
	}
	// awaitRefusal checks until the check fails with this output.
	awaitRefusal := func(dsn, output string) {
		GinkgoHelper()
		Eventually(func(g Gomega) {
			p := programs.Run(suite.Prepared(), "relay", []string{"check"}, checkEnv(dsn, own.ClickHouseDSNs.Native)...)
			p.EndsWithAny()
			g.Expect(p.ExitCode()).To(Equal(1))
			g.Expect(string(p.Out.Contents())).To(MatchRegexp(output))
		}).WithTimeout(patience).Should(Succeed())
	}
	certified := []string{"user", "certified", "sslmode", "verify-full", "sslrootcert", "ca.crt"}
	as := func(client string) []string {
		return append(slices.Clip(certified), "sslcert", client+".crt", "sslkey", client+".key")
	}

	It("delivers over a verified connection, with a certificate of the client and without a password", func(ctx SpecContext) {
		verified := "DIEHARD_POSTGRES_DSN=" + dsn(as("client")...)
		api, relay := s.API(verified), s.Relay(s.ClickHouse.Native, verified)
		system.Create(ctx, api, system.NewUser{Email: "ada@example.com"})
		s.ExpectDelivered(ctx, 1)
		Expect(relay.Metric("diehard_relay_listening")).To(Equal(1.0))
		Expect(check(0, dsn(as("client")...))).To(MatchRegexp(`ok +postgresql connection .* with TLS, role certified`))
		var encrypted, others int
		Expect(s.Postgres.QueryRowContext(ctx, `SELECT count(*) FILTER (WHERE ssl), count(*) FILTER (WHERE NOT ssl) FROM pg_stat_ssl
			JOIN pg_stat_activity USING (pid) WHERE application_name LIKE 'diehard-%'`).Scan(&encrypted, &others)).To(Succeed())
		Expect(encrypted).To(BeNumerically(">", 2))
		Expect(others).To(BeZero())
	})

	DescribeTable("checks the certificate of the server", func(parameters []string, problem, remedy string) {
		if problem == "" {
			Expect(check(0, dsn(parameters...))).To(MatchRegexp(`ok +postgresql connection .* with TLS`))
			return
		}
		// A server that refuses a client closes the connection, and sometimes the client
		// sees only that.
		awaitRefusal(dsn(parameters...), fmt.Sprintf(`FAILED +postgresql connection .*%s.*\n +to fix it: .*%s`, problem, remedy))
	},
		Entry("signed by the authority", []string{"sslmode", "verify-full", "sslrootcert", "ca.crt"}, "", ""),
		Entry("without verification, the default", []string{"sslmode", "require"}, "", ""),
		Entry("signed by another authority", []string{"sslmode", "verify-full", "sslrootcert", "other.crt"}, "certificate signed by unknown authority", "set sslrootcert"),
		Entry("signed by another authority, without the name", []string{"sslmode", "verify-ca", "sslrootcert", "other.crt"}, "certificate signed by unknown authority", "set sslrootcert"),
		Entry("signed by no authority of the system", []string{"sslmode", "verify-full"}, "certificate signed by unknown authority", "set sslrootcert"),
		Entry("with a missing file", []string{"sslmode", "verify-full", "sslrootcert", "missing.crt"}, "no such file", "correct the file"),
		Entry("client without a certificate", certified, "requires a valid client certificate", "correct the user in postgres.dsn, or allow"),
		Entry("client with an expired certificate", as("expired"), "expired certificate", "correct sslcert and sslkey"),
		Entry("client with a certificate of another authority", as("foreign"), "unknown certificate authority", "correct sslcert and sslkey"),
	)

	Describe("after a change of the server's certificate", func() {
		AfterEach(func(ctx SpecContext) { serve(ctx, ca, "db.example.com", tomorrow, loopback) })

		// With verification of the authority only, the name does not matter.
		It("refuses another name", func(ctx SpecContext) {
			serve(ctx, ca, "db.example.com", tomorrow)
			awaitRefusal(dsn("sslmode", "verify-full", "sslrootcert", "ca.crt"),
				`FAILED +postgresql connection .*doesn't contain any IP SANs.*\n +to fix it: use a name of the certificate`)
			Expect(check(0, dsn("sslmode", "verify-ca", "sslrootcert", "ca.crt"))).To(ContainSubstring("with TLS"))
		})

		It("refuses an expired one, and the relay delivers again after its renewal", func(ctx SpecContext) {
			verified := dsn("sslmode", "verify-full", "sslrootcert", "ca.crt")
			relay := s.Relay(s.ClickHouse.Native, "DIEHARD_POSTGRES_DSN="+verified)
			serve(ctx, ca, "db.example.com", expired, loopback)
			awaitRefusal(verified, `FAILED +postgresql connection .*certificate has expired.*\n +to fix it: renew the certificate of the server`)
			s.Postgres.MustExecContext(ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'diehard-relay'")
			Eventually(relay.Ready).WithTimeout(patience).Should(Equal(503))
			serve(ctx, ca, "db.example.com", tomorrow, loopback)
			Eventually(relay.Ready).WithTimeout(patience).Should(Equal(200))
			before, _ := s.Arrived(ctx, Default)
			Expect(s.Publish(ctx, system.Events(3)...)).To(Succeed())
			s.ExpectDelivered(ctx, before+3)
		})
	})

	It("is required by default", func(ctx SpecContext) {
		s.Postgres.MustExecContext(ctx, "ALTER SYSTEM SET ssl = off")
		s.Postgres.MustExecContext(ctx, "SELECT pg_reload_conf()")
		awaitRefusal(dsn("sslmode", "require"), `FAILED +postgresql connection .*SSL is not enabled.*\n +to fix it: turn on TLS in PostgreSQL`)
	})
})
