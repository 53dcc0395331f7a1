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
	"sync"

	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// Gateway passes HTTP requests on to ClickHouse. It knows which statements have
// passed, and can make the server see settings that the client did not send, as
// those of its user's profile.
type Gateway struct {
	mu         sync.Mutex
	statements []string
	settings   url.Values
}

// StartGatewayTo starts a gateway to the ClickHouse that dsn, a URL, leads to,
// which ends with the spec, and returns the DSN that leads through it.
func StartGatewayTo(dsn string) (g *Gateway, through string) {
	ginkgo.GinkgoHelper()
	u, err := url.Parse(dsn)
	Expect(err).NotTo(HaveOccurred())
	g = &Gateway{}
	target := &url.URL{Scheme: u.Scheme, Host: u.Host}
	server := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(request *httputil.ProxyRequest) {
		request.SetURL(target)
		g.pass(request.Out)
	}})
	ginkgo.DeferCleanup(server.Close)
	front, err := url.Parse(server.URL)
	Expect(err).NotTo(HaveOccurred())
	u.Host = front.Host
	return g, u.String()
}

// Impose has every statement from now on run with these settings, NAME=VALUE
// with & between them, and no longer with those imposed before.
func (g *Gateway) Impose(settings string) {
	ginkgo.GinkgoHelper()
	parsed, err := url.ParseQuery(settings)
	Expect(err).NotTo(HaveOccurred())
	g.mu.Lock()
	defer g.mu.Unlock()
	g.settings = parsed
}

// Statements are those that have passed, each as far as it is text.
func (g *Gateway) Statements() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.statements)
}

func (g *Gateway) pass(request *http.Request) {
	query := request.URL.Query()
	statement := query.Get("query") // of an insert, whose rows are the body
	if statement == "" {
		text, err := io.ReadAll(request.Body)
		if err != nil {
			return // whoever sends it has gone
		}
		statement = string(text)
		request.Body = io.NopCloser(bytes.NewReader(text))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.statements = append(g.statements, statement)
	maps.Copy(query, g.settings)
	request.URL.RawQuery = query.Encode()
}
