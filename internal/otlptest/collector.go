// Package otlptest receives the spans of a program on a local port, as a collector of
// OpenTelemetry does.
package otlptest

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"

	"github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// Collector receives spans by OTLP over HTTP and gRPC.
type Collector struct {
	collector.UnimplementedTraceServiceServer

	server *httptest.Server
	grpc   string

	mu       sync.Mutex
	spans    []Span
	problems []error
}

// Span is a span with its ids in hex.
type Span struct {
	*trace.Span

	// Trace, ID and Parent are the ids of the trace, of the span and of its parent.
	Trace, ID, Parent string
	// Links are the ids of the linked traces.
	Links []string
	// Attributes has the attributes of the span, and Resource those of the program.
	Attributes, Resource map[string]any
}

// Start starts a collector that ends with the spec. The spec fails if a request was not
// valid.
func Start() *Collector {
	c := &Collector{}
	c.server = httptest.NewServer(http.HandlerFunc(c.receive))
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // ends with the spec
	Expect(err).NotTo(HaveOccurred())
	c.grpc = listener.Addr().String()
	server := grpc.NewServer()
	collector.RegisterTraceServiceServer(server, c)
	go func() { _ = server.Serve(listener) }()
	ginkgo.DeferCleanup(func() {
		server.Stop()
		c.server.Close()
		Expect(c.problems).To(BeEmpty())
	})
	return c
}

// URL returns the value of OTEL_EXPORTER_OTLP_ENDPOINT.
func (c *Collector) URL() string { return c.server.URL }

// GRPC returns the value of OTEL_EXPORTER_OTLP_ENDPOINT for the protocol grpc.
func (c *Collector) GRPC() string { return "http://" + c.grpc }

// Export implements collector.TraceServiceServer.
func (c *Collector) Export(_ context.Context, request *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spans = append(c.spans, spansOf(request)...)
	return &collector.ExportTraceServiceResponse{}, nil
}

// Spans returns the spans that have arrived.
func (c *Collector) Spans() []Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Span(nil), c.spans...)
}

// Named returns the spans with this name.
func (c *Collector) Named(name string) (spans []Span) {
	for _, span := range c.Spans() {
		if span.GetName() == name {
			spans = append(spans, span)
		}
	}
	return spans
}

func (c *Collector) receive(w http.ResponseWriter, r *http.Request) {
	spans, err := Read(r, "/v1/traces")
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.problems = append(c.problems, err)
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	c.spans = append(c.spans, spans...)
	w.Header().Set("Content-Type", contentType)
}

const contentType = "application/x-protobuf"

// Read returns the spans of a request. It returns an error if the request has another path.
func Read(r *http.Request, path string) (spans []Span, err error) {
	if r.Method != http.MethodPost || r.URL.Path != path || r.Header.Get("Content-Type") != contentType {
		return nil, fmt.Errorf("%s %s with %q is not an export of traces", r.Method, r.URL.Path, r.Header.Get("Content-Type"))
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	var request collector.ExportTraceServiceRequest
	if err := proto.Unmarshal(body, &request); err != nil {
		return nil, err
	}
	return spansOf(&request), nil
}

func spansOf(request *collector.ExportTraceServiceRequest) (spans []Span) {
	for _, resource := range request.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, span := range scope.GetSpans() {
				spans = append(spans, newSpan(resource, span))
			}
		}
	}
	return spans
}

func newSpan(resource *trace.ResourceSpans, span *trace.Span) Span {
	s := Span{
		Span: span, Trace: hex.EncodeToString(span.GetTraceId()), ID: hex.EncodeToString(span.GetSpanId()),
		Parent:     hex.EncodeToString(span.GetParentSpanId()),
		Attributes: values(span.GetAttributes()), Resource: values(resource.GetResource().GetAttributes()),
	}
	for _, link := range span.GetLinks() {
		s.Links = append(s.Links, hex.EncodeToString(link.GetTraceId()))
	}
	return s
}

func values(attributes []*common.KeyValue) map[string]any {
	m := make(map[string]any, len(attributes))
	for _, a := range attributes {
		switch value := a.GetValue().GetValue().(type) {
		case *common.AnyValue_StringValue:
			m[a.GetKey()] = value.StringValue
		case *common.AnyValue_IntValue:
			m[a.GetKey()] = value.IntValue
		default:
			m[a.GetKey()] = a.GetValue().String()
		}
	}
	return m
}
