package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/getsentry/sentry-go"
	"github.com/go-logr/logr"
	"github.com/google/uuid"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// tracerName is the instrumentation scope of all spans.
const tracerName = "github.com/diehard-outbox/diehard"

// TracesOptions configures StartTraces.
type TracesOptions struct {
	// Service is the name of the service, unless OTEL_SERVICE_NAME is set.
	Service string
	// Environment and Version are attributes of the service.
	Environment, Version string
	// Log receives the errors of the export, at most one record a minute.
	Log *slog.Logger
	// Sentry also gets the spans if it has a DSN. TracesSampleRate is the share of the
	// sampled traces that it gets.
	Sentry SentryOptions
}

// StartTraces starts to export spans if the OTEL_ environment variables turn the export
// on. Otherwise the tracer is nil. The program must call stop before it exits; stop sends
// pending spans within 3 seconds.
//
// A span never waits for the export. If an exporter is slow, its queue drops spans.
func StartTraces(ctx context.Context, o TracesOptions) (tracer trace.Tracer, stop func(), err error) {
	protocol, err := tracesProtocol()
	if protocol == "" || err != nil {
		return nil, func() {}, err
	}
	log := &exportLog{log: o.Log}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(log.failed))
	otel.SetLogger(logr.FromSlogHandler(o.Log.Handler()))

	service, err := resource.New(ctx,
		resource.WithTelemetrySDK(),
		resource.WithAttributes(
			semconv.ServiceName(o.Service),
			semconv.ServiceVersion(o.Version),
			semconv.ServiceInstanceID(uuid.NewString()),
			semconv.DeploymentEnvironmentNameKey.String(o.Environment),
		),
		resource.WithFromEnv(), // overrides the attributes above
	)
	if err != nil {
		log.failed(err) // for example a malformed OTEL_RESOURCE_ATTRIBUTES; the other attributes are set
	}
	exporter, err := newExporter(ctx, protocol)
	if err != nil {
		return nil, nil, fmt.Errorf("start traces: %w", err)
	}
	options := []sdktrace.TracerProviderOption{sdktrace.WithResource(service), sdktrace.WithBatcher(exporter)}
	if o.Sentry.DSN != "" && o.Sentry.TracesSampleRate > 0 {
		processor, err := sentryProcessor(ctx, o.Sentry)
		if err != nil {
			return nil, nil, err
		}
		options = append(options, sdktrace.WithSpanProcessor(processor))
	}
	provider := sdktrace.NewTracerProvider(options...) // OTEL_TRACES_SAMPLER, OTEL_SPAN_… and OTEL_BSP_… apply
	return provider.Tracer(tracerName, trace.WithInstrumentationVersion(o.Version)), func() {
		ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
		defer cancel()
		if err := provider.Shutdown(ctx); err != nil {
			log.failed(fmt.Errorf("send pending spans: %w", err))
		}
	}, nil
}

// The protocols of OTLP that the programs have.
const (
	protocolHTTP = "http/protobuf"
	protocolGRPC = "grpc"
)

// newExporter returns an exporter. It reads its options from the environment, and does not
// connect.
func newExporter(ctx context.Context, protocol string) (sdktrace.SpanExporter, error) {
	if protocol == protocolGRPC {
		return otlptracegrpc.New(ctx) //nolint:wrapcheck // the caller wraps it
	}
	return otlptracehttp.New(ctx) //nolint:wrapcheck // the caller wraps it
}

// tracesProtocol returns the protocol of the export of traces, or an empty text if the
// environment does not turn the export on. It returns an error if the environment asks for
// an exporter or a protocol that the programs lack.
// https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
func tracesProtocol() (string, error) {
	if strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") {
		return "", nil
	}
	name, endpoint := firstSet("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
	switch exporter := os.Getenv("OTEL_TRACES_EXPORTER"); exporter {
	case "otlp":
	case "":
		if endpoint == "" {
			return "", nil
		}
	case "none":
		return "", nil
	default:
		return "", fmt.Errorf("OTEL_TRACES_EXPORTER is %q, must be otlp or none", exporter)
	}
	if endpoint != "" && !isHTTP(endpoint) {
		return "", errors.New(name + " is not a URL such as http://localhost:4318")
	}
	switch name, protocol := firstSet("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"); protocol {
	case "":
		return protocolHTTP, nil
	case protocolHTTP, protocolGRPC:
		return protocol, nil
	default:
		return "", fmt.Errorf("%s is %q, must be %s or %s", name, protocol, protocolHTTP, protocolGRPC)
	}
}

// firstSet returns the first of the environment variables that is not empty.
func firstSet(names ...string) (name, value string) {
	for _, name := range names {
		if value := os.Getenv(name); value != "" {
			return name, value
		}
	}
	return "", ""
}

func isHTTP(text string) bool {
	u, err := url.Parse(text)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != ""
}

// sentryProcessor sends spans to Sentry, which accepts OTLP.
// https://docs.sentry.io/concepts/otlp/
func sentryProcessor(ctx context.Context, o SentryOptions) (sdktrace.SpanProcessor, error) {
	dsn, err := sentry.NewDsn(o.DSN)
	if err != nil {
		return nil, CheckSentryDSN(o.DSN)
	}
	endpoint := dsn.GetAPIURL()
	endpoint.Path = strings.TrimSuffix(endpoint.Path, "/envelope/") + "/integration/otlp/v1/traces/"
	// The options override the environment variables, which are for the collector. The
	// exporter of sentry-go would use http for Sentry if OTEL_EXPORTER_OTLP_ENDPOINT does.
	exporter, err := otlptracehttp.New(ctx,
		otlptracehttp.WithEndpointURL(endpoint.String()),
		otlptracehttp.WithTLSClientConfig(nil), // the default
		otlptracehttp.WithHeaders(map[string]string{
			"X-Sentry-Auth": "Sentry sentry_version=7, sentry_client=sentry.go/" + sentry.SDKVersion + ", sentry_key=" + dsn.GetPublicKey(),
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("start traces for Sentry: %w", err)
	}
	return &share{SpanProcessor: sdktrace.NewBatchSpanProcessor(exporter), of: sdktrace.TraceIDRatioBased(o.TracesSampleRate)}, nil
}

// share processes a share of the traces. Both programs choose the same traces.
type share struct {
	sdktrace.SpanProcessor

	of sdktrace.Sampler
}

// OnEnd implements sdktrace.SpanProcessor.
func (s *share) OnEnd(span sdktrace.ReadOnlySpan) {
	if s.of.ShouldSample(sdktrace.SamplingParameters{TraceID: span.SpanContext().TraceID()}).Decision == sdktrace.RecordAndSample {
		s.SpanProcessor.OnEnd(span)
	}
}

// exportLog logs the errors of the exporters.
type exportLog struct {
	log *slog.Logger

	mu      sync.Mutex
	last    time.Time // of the last record
	omitted int       // errors since then
}

const exportLogInterval = time.Minute

func (l *exportLog) failed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.last.IsZero() && time.Since(l.last) < exportLogInterval {
		l.omitted++
		return
	}
	// A warning, because no user or event is affected, and an error would go to Sentry.
	l.log.Warn("exporting traces failed", "err", err, "omitted", l.omitted)
	l.last, l.omitted = time.Now(), 0
}
