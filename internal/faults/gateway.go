package faults

import (
	"bytes"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// Gateway passes HTTP requests to ClickHouse. It records the statements. Like a user's
// profile, it can add settings that the client did not send.
type Gateway struct {
	mu         sync.Mutex
	statements []string
	settings   url.Values
	refusal    int
	limit      int64
	denied     string
	before     func(statement string)
}

// StartGatewayTo starts a gateway to the ClickHouse of dsn, which must be a URL. It
// returns the DSN of the gateway. The gateway ends with the spec.
func StartGatewayTo(dsn string) (g *Gateway, through string) {
	ginkgo.GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	g = &Gateway{}
	target := &url.URL{Scheme: u.Scheme, Host: u.Host}
	proxy := &httputil.ReverseProxy{Rewrite: func(request *httputil.ProxyRequest) {
		request.SetURL(target)
		g.pass(request.Out)
	}}
	server := httptest.NewServer(http.HandlerFunc(func(response http.ResponseWriter, request *http.Request) {
		if status := g.refuses(request); status != 0 {
			http.Error(response, "the gateway refuses the request", status)
			return
		}
		if g.denies(request) {
			response.Header().Set("X-Clickhouse-Exception-Code", "497")
			http.Error(response, "Code: 497. DB::Exception: relay: Not enough privileges. (ACCESS_DENIED)", http.StatusForbidden)
			return
		}
		proxy.ServeHTTP(response, request)
	}))
	ginkgo.DeferCleanup(server.Close)
	front, err := url.Parse(server.URL)
	Expect(err).NotTo(HaveOccurred())
	u.Host = front.Host
	return g, u.String()
}

// Impose adds settings to every later statement, in the form NAME=VALUE
// separated by &. They replace settings imposed before.
func (g *Gateway) Impose(settings string) {
	ginkgo.GinkgoHelper()
	parsed, err := url.ParseQuery(settings)
	Expect(err).NotTo(HaveOccurred())
	g.mu.Lock()
	defer g.mu.Unlock()
	g.settings = parsed
}

// Refuse makes the gateway respond with an HTTP status to every later request whose body is
// larger than a number of bytes. It does not read the rest of the body.
func (g *Gateway) Refuse(status int, limit int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.refusal, g.limit = status, limit
}

// refuses returns the status with which the gateway refuses the request, or 0.
func (g *Gateway) refuses(request *http.Request) int {
	g.mu.Lock()
	status, limit := g.refusal, g.limit
	g.mu.Unlock()
	if status == 0 {
		return 0
	}
	var begin bytes.Buffer
	if n, _ := io.CopyN(&begin, request.Body, limit+1); n > limit {
		return status
	}
	request.Body = io.NopCloser(&begin)
	return 0
}

// Deny makes the gateway respond to every later statement that contains the text as
// ClickHouse does if its user lacks a right. The engine of the tests has no rights. An empty
// text ends this.
func (g *Gateway) Deny(text string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.denied = text
}

func (g *Gateway) denies(request *http.Request) bool {
	g.mu.Lock()
	denied := g.denied
	g.mu.Unlock()
	return denied != "" && strings.Contains(statementOf(request), denied)
}

// Before makes every later statement wait until do has returned.
func (g *Gateway) Before(do func(statement string)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.before = do
}

// Statements returns the text of each statement so far.
func (g *Gateway) Statements() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.statements)
}

func (g *Gateway) pass(request *http.Request) {
	statement := statementOf(request)
	g.mu.Lock()
	before := g.before
	g.mu.Unlock()
	if before != nil {
		before(statement)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.statements = append(g.statements, statement)
	query := request.URL.Query()
	maps.Copy(query, g.settings)
	request.URL.RawQuery = query.Encode()
}

// statementOf returns the statement of the request. The body of an insert holds the rows, and
// its statement is in the URL.
func statementOf(request *http.Request) string {
	if statement := request.URL.Query().Get("query"); statement != "" {
		return statement
	}
	text, err := io.ReadAll(request.Body)
	if err != nil {
		return "" // the client has disconnected
	}
	request.Body = io.NopCloser(bytes.NewReader(text))
	return string(text)
}
