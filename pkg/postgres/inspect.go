package postgres

import (
	"context"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"

	"github.com/lib/pq"
	"github.com/lib/pq/pqerror"

	"github.com/diehard-outbox/diehard/pkg/checkup"
	"github.com/diehard-outbox/diehard/pkg/postgres/internal/pqdriver"
)

// Server describes the server of a connection.
type Server struct {
	// Address is the address of the server, or of a proxy in front of it.
	Address string
	// Version is the server's version, such as 18.0.
	Version        string
	Database, Role string
	TLS            bool
}

// Inspect connects to the server of dsn and describes it. db is a pool for the same DSN.
// The error contains no secrets of the DSN. It is a *checkup.ProblemError if the cause is
// known.
func Inspect(ctx context.Context, db *sql.DB, dsn string) (Server, error) {
	var server Server
	conn, err := db.Conn(ctx)
	if err != nil {
		return Server{}, explain(ctx, dsn, err)
	}
	defer conn.Close()
	if err := conn.Raw(func(driver any) error {
		if remote, ok := driver.(interface{ RemoteAddr() net.Addr }); ok {
			server.Address = remote.RemoteAddr().String()
		}
		return nil
	}); err != nil {
		return Server{}, explain(ctx, dsn, err)
	}
	err = conn.QueryRowContext(ctx, `
		SELECT current_setting('server_version'), current_database(), current_user,
		       coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), false)`).
		Scan(&server.Version, &server.Database, &server.Role, &server.TLS)
	if err != nil {
		return Server{}, explain(ctx, dsn, err)
	}
	return server, nil
}

// tlsRemedy returns the remedy for an error of TLS, or "".
func tlsRemedy(err error) string {
	if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); unknown {
		return "set sslrootcert in postgres.dsn to the certificate of the authority that has signed the certificate of the server"
	}
	if _, mismatch := errors.AsType[x509.HostnameError](err); mismatch {
		return "use a name of the certificate as the host in postgres.dsn, or install a certificate with this name in PostgreSQL"
	}
	if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok && invalid.Reason == x509.Expired {
		return "renew the certificate of the server"
	}
	// crypto/tls returns the alerts of the server in this form.
	if alert, ok := errors.AsType[*net.OpError](err); ok && alert.Op == "remote error" && strings.Contains(alert.Error(), "certificate") {
		return "correct sslcert and sslkey in postgres.dsn: the server refuses the certificate of the client"
	}
	if _, unreadable := errors.AsType[*fs.PathError](err); unreadable {
		return "correct the file in postgres.dsn"
	}
	return ""
}

// explain returns the problem and the remedy for an error of a connection.
func explain(ctx context.Context, dsn string, err error) error {
	server := "postgresql at " + strings.Join(pqdriver.Hosts(dsn), ", ")
	if cause := errors.Unwrap(err); cause != nil { // without the operation
		err = cause
	}
	problem := func(remedy string) error {
		return &checkup.ProblemError{Problem: fmt.Sprintf("%s: %v", server, err), Remedy: remedy}
	}
	if refused, ok := errors.AsType[*pq.Error](err); ok {
		switch {
		case refused.Code == pqerror.InvalidPassword:
			return problem("correct the user and the password in postgres.dsn, or in postgres.password_file")
		case class(refused) == invalidAuthorization:
			return problem("correct the user in postgres.dsn, or allow the connection in pg_hba.conf")
		case refused.Code == pqerror.InvalidCatalogName:
			return problem("correct the name of the database in postgres.dsn, or create the database: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0")
		case refused.Code == pqerror.InsufficientPrivilege:
			return problem("GRANT CONNECT ON DATABASE … TO the role")
		case class(refused) == insufficientResources:
			return problem("close other connections, or increase max_connections")
		}
		return problem("find the cause in the log of PostgreSQL")
	}
	if _, unreadable := errors.AsType[*pqdriver.PasswordError](err); unreadable {
		return problem("write the password into the file, or correct postgres.password_file")
	}
	if remedy := tlsRemedy(err); remedy != "" {
		return problem(remedy)
	}
	netErr, isNet := errors.AsType[net.Error](err)
	switch {
	case errors.Is(err, pq.ErrSSLNotSupported):
		return problem("turn on TLS in PostgreSQL, or add sslmode=disable to postgres.dsn if the network is trusted")
	case errors.Is(ctx.Err(), context.DeadlineExceeded), isNet && netErr.Timeout():
		return checkup.NoResponse(server, "the host and the port in postgres.dsn")
	case isNet:
		return problem("start PostgreSQL, or correct the host and the port in postgres.dsn")
	}
	return problem("check that PostgreSQL runs there, and the host and the port in postgres.dsn")
}
