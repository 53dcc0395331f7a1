package chserver_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strings"

	"github.com/ClickHouse/ch-go/compress"
	"github.com/klauspost/compress/zstd"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// call is one request, like a request of curl.
type call struct {
	method     string // POST by default
	path       string // / by default
	parameters map[string]string
	headers    map[string]string
	body       string
	anonymous  bool // sends only the credentials in headers and parameters
}

type answer struct {
	status  int
	headers http.Header
	body    string
}

func (c call) do(ctx context.Context) answer {
	GinkgoHelper()
	values := url.Values{}
	for name, value := range c.parameters {
		values.Set(name, value)
	}
	if c.method == "" {
		c.method = http.MethodPost
	}
	if c.path == "" {
		c.path = "/"
	}
	address := url.URL{Scheme: "http", Host: server.HTTPAddr(), Path: c.path, RawQuery: values.Encode()}
	r, err := http.NewRequestWithContext(ctx, c.method, address.String(), strings.NewReader(c.body))
	Expect(err).NotTo(HaveOccurred())
	if !c.anonymous {
		r.SetBasicAuth(user, password)
	}
	r.Header.Set("Accept-Encoding", "identity")
	for name, value := range c.headers {
		r.Header.Set(name, value)
	}
	response, err := http.DefaultClient.Do(r)
	Expect(err).NotTo(HaveOccurred())
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	Expect(err).NotTo(HaveOccurred())
	return answer{response.StatusCode, response.Header, string(body)}
}

// query runs a statement and expects it to succeed.
func query(ctx context.Context, statement string) string {
	GinkgoHelper()
	a := call{body: statement}.do(ctx)
	Expect(a.status).To(Equal(http.StatusOK), a.body)
	return a.body
}

// newTable creates a table with a number and a text column.
func newTable(ctx context.Context) string {
	GinkgoHelper()
	table := newName("t")
	query(ctx, "CREATE TABLE "+table+" (n UInt64, s String) ENGINE = MergeTree ORDER BY n SETTINGS non_replicated_deduplication_window = 100")
	return table
}

var _ = Describe("The HTTP interface", func() {
	It("responds to health checks without credentials", func(ctx SpecContext) {
		for _, path := range []string{"/ping", "/", "/replicas_status"} {
			a := call{method: http.MethodGet, path: path, anonymous: true}.do(ctx)
			Expect(a.status).To(Equal(http.StatusOK), path)
			Expect(a.body).To(Equal("Ok.\n"))
		}
		Expect(call{path: "/nowhere"}.do(ctx).status).To(Equal(http.StatusNotFound))
	})

	DescribeTable("accepts a query from", func(ctx SpecContext, c call) {
		a := c.do(ctx)
		Expect(a.status).To(Equal(http.StatusOK), a.body)
		Expect(a.body).To(Equal("3\n"))
		Expect(a.headers).To(HaveKeyWithValue("X-Clickhouse-Format", []string{"TabSeparated"}))
		Expect(a.headers.Get("X-ClickHouse-Query-Id")).NotTo(BeEmpty())
		Expect(a.headers.Get("X-ClickHouse-Timezone")).NotTo(BeEmpty())
		Expect(json.Valid([]byte(a.headers.Get("X-ClickHouse-Summary")))).To(BeTrue())
	},
		Entry("the URL, by GET", call{method: http.MethodGet, parameters: map[string]string{"query": "SELECT 1 + 2"}}),
		Entry("the URL, by POST", call{parameters: map[string]string{"query": "SELECT 1 + 2"}}),
		Entry("the body", call{body: "SELECT 1 + 2"}),
		Entry("the URL and the body, joined", call{parameters: map[string]string{"query": "SELECT 1"}, body: "+ 2"}),
	)

	DescribeTable("accepts the data of an INSERT in text formats and in Native",
		func(ctx SpecContext, format, data string) {
			table := newTable(ctx)
			a := call{parameters: map[string]string{"query": "INSERT INTO " + table + " FORMAT " + format}, body: data}.do(ctx)
			Expect(a.status).To(Equal(http.StatusOK), a.body)
			Expect(query(ctx, "SELECT n, s FROM "+table+" ORDER BY n FORMAT JSONCompactEachRow")).To(Equal(
				`[1, "one"]` + "\n" + `[2, "two\nlines"]` + "\n"))

			By("with the statement and the data in the body")
			table = newTable(ctx)
			query(ctx, "INSERT INTO "+table+" FORMAT "+format+"\n"+data)
			Expect(query(ctx, "SELECT count() FROM "+table)).To(Equal("2\n"))
		},
		Entry(nil, "JSONEachRow", `{"n":1,"s":"one"}`+"\n"+`{"n":2,"s":"two\nlines"}`),
		Entry(nil, "TabSeparated", "1\tone\n2\ttwo\\nlines\n"),
		Entry(nil, "CSV", "1,one\n2,\"two\nlines\"\n"),
		Entry(nil, "Values", `(1, 'one'), (2, 'two\nlines')`),
		// Two columns, two rows. The value 10 is also the newline byte.
		Entry(nil, "Native", "\x02\x02\x01n\x06UInt64\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00"+
			"\x01s\x06String\x03one\x09two\nlines"),
	)

	It("keeps merged parts as long as clickhouse-server does", func(ctx SpecContext) {
		Expect(query(ctx, "SELECT value FROM system.merge_tree_settings WHERE name = 'old_parts_lifetime'")).To(Equal("480\n"))
	})

	It("applies settings and parameters of the URL to one query only", func(ctx SpecContext) {
		a := call{
			parameters: map[string]string{"max_threads": "3", "param_name": "it's \\ \"x\"", "param_n": "42"},
			body:       "SELECT getSetting('max_threads'), {name:String}, {n:UInt8} FORMAT JSONCompactEachRow",
		}.do(ctx)
		Expect(a.body).To(Equal(`[3, "it's \\ \"x\"", 42]` + "\n"))
		Expect(query(ctx, "SELECT value, changed FROM system.settings WHERE name = 'max_threads'")).NotTo(HavePrefix("3\t"))
	})

	It("drops an insert with a known insert_deduplication_token", func(ctx SpecContext) {
		table := newTable(ctx)
		for _, token := range []string{"a", "a", "b"} {
			a := call{
				parameters: map[string]string{"query": "INSERT INTO " + table + " FORMAT CSV", "insert_deduplicate": "1", "insert_deduplication_token": token},
				body:       "1,x\n",
			}.do(ctx)
			Expect(a.status).To(Equal(http.StatusOK), a.body)
		}
		Expect(query(ctx, "SELECT count() FROM "+table)).To(Equal("2\n"))
	})

	DescribeTable("responds in the requested format",
		func(ctx SpecContext, c call, contentType string) {
			c.body += "SELECT 1 AS one" + c.parameters["after"]
			c.parameters = maps.Clone(c.parameters)
			delete(c.parameters, "after")
			a := c.do(ctx)
			Expect(a.body).To(Equal("{\"one\":1}\n"))
			Expect(a.headers.Get("Content-Type")).To(Equal(contentType))
			Expect(a.headers.Get("X-ClickHouse-Format")).To(Equal("JSONEachRow"))
		},
		Entry("by the query", call{parameters: map[string]string{"after": " FORMAT JSONEachRow"}}, "application/json; charset=UTF-8"),
		Entry("by a parameter", call{parameters: map[string]string{"default_format": "JSONEachRow"}}, "application/json; charset=UTF-8"),
		Entry("by a header", call{headers: map[string]string{"X-ClickHouse-Format": "JSONEachRow"}}, "application/json; charset=UTF-8"),
	)

	Describe("compression", func() {
		const text = "1,one\n2,two\n"

		DescribeTable("of a request", func(ctx SpecContext, encode func(string) string, parameter, encoding string) {
			table := newTable(ctx)
			c := call{parameters: map[string]string{"query": "INSERT INTO " + table + " FORMAT CSV"}, body: encode(text)}
			if parameter != "" {
				c.parameters[parameter] = "1"
			}
			if encoding != "" {
				c.headers = map[string]string{"Content-Encoding": encoding}
			}
			a := c.do(ctx)
			Expect(a.status).To(Equal(http.StatusOK), a.body)
			Expect(query(ctx, "SELECT sum(n) FROM "+table)).To(Equal("3\n"))
		},
			Entry("as ClickHouse's frames", func(s string) string {
				w := compress.NewWriter(compress.LevelZero, compress.LZ4)
				Expect(w.Compress([]byte(s))).To(Succeed())
				return string(w.Data)
			}, "decompress", ""),
			Entry("as gzip", func(s string) string {
				var b bytes.Buffer
				w := gzip.NewWriter(&b)
				_, _ = io.WriteString(w, s)
				Expect(w.Close()).To(Succeed())
				return b.String()
			}, "", "gzip"),
			Entry("as zstd", func(s string) string {
				w, err := zstd.NewWriter(nil)
				Expect(err).NotTo(HaveOccurred())
				return string(w.EncodeAll([]byte(s), nil))
			}, "", "zstd"),
		)

		It("of a response", func(ctx SpecContext) {
			a := call{body: "SELECT number FROM numbers(3)", parameters: map[string]string{"compress": "1"}}.do(ctx)
			frames := make([]byte, len("0\n1\n2\n"))
			_, err := io.ReadFull(compress.NewReader(strings.NewReader(a.body)), frames)
			Expect(err).NotTo(HaveOccurred())
			Expect(string(frames)).To(Equal("0\n1\n2\n"))

			a = call{body: "SELECT 1", headers: map[string]string{"Accept-Encoding": "gzip"}}.do(ctx)
			Expect(a.headers.Get("Content-Encoding")).To(Equal("gzip"))
			plain, err := gzip.NewReader(strings.NewReader(a.body))
			Expect(err).NotTo(HaveOccurred())
			Expect(io.ReadAll(plain)).To(BeEquivalentTo("1\n"))
		})

		It("with invalid data is refused, and inserts no rows", func(ctx SpecContext) {
			table := newTable(ctx)
			a := call{
				parameters: map[string]string{"query": "INSERT INTO " + table + " FORMAT CSV", "decompress": "1"},
				body:       strings.Repeat("no frame ", 20),
			}.do(ctx)
			Expect(a.status).NotTo(Equal(http.StatusOK))
			Expect(a.headers.Get("X-ClickHouse-Exception-Code")).NotTo(BeEmpty())
			Expect(query(ctx, "SELECT count() FROM "+table)).To(Equal("0\n"))
		})
	})

	DescribeTable("reports an error with ClickHouse's code and status",
		func(ctx SpecContext, c call, status int, code, text string) {
			a := c.do(ctx)
			Expect(a.status).To(Equal(status), a.body)
			Expect(a.headers.Get("X-ClickHouse-Exception-Code")).To(Equal(code))
			Expect(a.body).To(HavePrefix("Code: " + code + ". DB::Exception: "))
			Expect(a.body).To(ContainSubstring(text))
		},
		Entry("of syntax", call{body: "SELEKT 1"}, http.StatusBadRequest, "62", "SYNTAX_ERROR"),
		Entry("of an empty query", call{}, http.StatusBadRequest, "62", "Empty query"),
		Entry("of two statements", call{body: "SELECT 1; SELECT 2"}, http.StatusBadRequest, "62", "Multi-statements"),
		Entry("of a missing table", call{body: "SELECT * FROM no_such_table"}, http.StatusNotFound, "60", "UNKNOWN_TABLE"),
		Entry("of a missing database", call{body: "SELECT 1", parameters: map[string]string{"database": "nowhere"}}, http.StatusNotFound, "81", "UNKNOWN_DATABASE"),
		Entry("of an unknown setting", call{body: "SELECT 1", parameters: map[string]string{"max_sped": "1"}}, http.StatusNotFound, "115", "UNKNOWN_SETTING"),
		Entry("of an invalid value", call{body: "SELECT toUInt8('x')"}, http.StatusBadRequest, "6", "CANNOT_PARSE_TEXT"),
		Entry("during execution", call{body: "SELECT throwIf(1)"}, http.StatusInternalServerError, "395", "FUNCTION_THROW_IF_VALUE_IS_NON_ZERO"),
		Entry("of a GET that would change data",
			call{method: http.MethodGet, parameters: map[string]string{"query": "CREATE DATABASE by_get"}}, http.StatusInternalServerError, "164", "READONLY"),
	)

	It("marks an error after a part of the result, or waits for the end on request", func(ctx SpecContext) {
		const failsLate = "SELECT throwIf(number = 9000000) FROM numbers(10000000) SETTINGS max_block_size = 1000"
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+server.HTTPAddr(), strings.NewReader(failsLate))
		Expect(err).NotTo(HaveOccurred())
		r.SetBasicAuth(user, password)
		response, err := http.DefaultClient.Do(r)
		Expect(err).NotTo(HaveOccurred())
		defer response.Body.Close()
		Expect(response.StatusCode).To(Equal(http.StatusOK))
		body, err := io.ReadAll(response.Body)
		Expect(err).To(HaveOccurred(), "the body must end with an error")
		Expect(string(body[len(body)-min(len(body), 1000):])).To(And(
			ContainSubstring("__exception__\r\n"+response.Header.Get("X-ClickHouse-Exception-Tag")), ContainSubstring("Code: 395.")))

		a := call{body: failsLate, parameters: map[string]string{"wait_end_of_query": "1"}}.do(ctx)
		Expect(a.status).To(Equal(http.StatusInternalServerError))
		Expect(a.headers.Get("X-ClickHouse-Exception-Code")).To(Equal("395"))
	})

	DescribeTable("authenticates by", func(ctx SpecContext, c call, status int) {
		c.anonymous, c.body = true, "SELECT 1"
		a := c.do(ctx)
		Expect(a.status).To(Equal(status), a.body)
		if status != http.StatusOK {
			Expect(a.headers.Get("X-ClickHouse-Exception-Code")).To(Equal("516"))
			Expect(a.body).NotTo(ContainSubstring(password))
		}
	},
		Entry("headers", call{headers: map[string]string{"X-ClickHouse-User": user, "X-ClickHouse-Key": password}}, http.StatusOK),
		Entry("the URL", call{parameters: map[string]string{"user": user, "password": password}}, http.StatusOK),
		Entry("nothing, and refuses", call{}, http.StatusForbidden),
		Entry("a wrong password, and refuses", call{parameters: map[string]string{"user": user, "password": "guess"}}, http.StatusForbidden),
		Entry("a wrong name, and refuses", call{parameters: map[string]string{"user": "root", "password": password}}, http.StatusForbidden),
	)
})
