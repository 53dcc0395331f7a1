package httpapi

import (
	"context"
	"net/http"
	"strconv"

	"github.com/getsentry/sentry-go"
	"github.com/labstack/echo/v4"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/diehard-outbox/diehard/pkg/outbox"
)

// traceInSpan runs the request in a span of Options.Tracer, and the request's events join
// this span. The span continues the client's trace. The sampler of the tracer decides
// whether it is sampled.
//
// The conventions for HTTP also require the path. The span does not have it, because a
// path and a query can contain personal data.
// https://opentelemetry.io/docs/specs/semconv/http/http-spans/
func (s *Server) traceInSpan(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		r, ctx := requestOf(c), c.Request().Context()
		if !r.traceparent.IsZero() { // otherwise the header is missing, invalid or given more than once
			ctx = propagation.TraceContext{}.Extract(ctx, propagation.HeaderCarrier(c.Request().Header))
		}
		if hub := sentry.CurrentHub(); hub.Client().IsEnabled() {
			ctx = sentry.SetHubOnContext(ctx, hubOf(c))
		}
		name, method := c.Request().Method, semconv.HTTPRequestMethodKey.String(c.Request().Method)
		if methodOf(c) == otherMethod {
			name, method = "HTTP", semconv.HTTPRequestMethodOther
		}
		attributes := append(make([]attribute.KeyValue, 0, 3), method, semconv.URLScheme(c.Scheme()))
		if c.Path() != "" {
			name += " " + c.Path()
			attributes = append(attributes, semconv.HTTPRoute(c.Path()))
		}
		ctx, span := s.tracer.Start(ctx, name, trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(attributes...))
		defer span.End()
		r.traceparent = joinSpan(ctx, c.Response().Header())
		c.SetRequest(c.Request().WithContext(ctx))

		err := next(c)

		status := c.Response().Status
		span.SetAttributes(semconv.HTTPResponseStatusCode(status))
		if status >= http.StatusInternalServerError {
			kind := r.problem
			if kind == "" {
				kind = strconv.Itoa(status)
			}
			span.SetAttributes(semconv.ErrorTypeKey.String(kind))
			span.SetStatus(codes.Error, "")
		}
		return err
	}
}

// joinSpan sets the traceparent of the response to the context's span, and returns it.
func joinSpan(ctx context.Context, response http.Header) outbox.Traceparent {
	propagation.TraceContext{}.Inject(ctx, propagation.HeaderCarrier(response))
	traceparent, err := outbox.ParseTraceparent(response.Get(sentry.TraceparentHeader))
	if err != nil { // unreachable: every span has ids
		return outbox.Traceparent{}
	}
	return traceparent
}

// publishOptions describe the span of inPublishSpan.
var publishOptions = []trace.SpanStartOption{
	trace.WithSpanKind(trace.SpanKindProducer),
	trace.WithAttributes(
		semconv.MessagingSystemKey.String("diehard"),
		semconv.MessagingDestinationName("outbox_events"),
		semconv.MessagingOperationName("publish"),
		semconv.MessagingOperationTypeSend,
	),
}

// inPublishSpan runs the transaction that writes a change and its events in a span. The
// span contains the wait for the transaction of the request's group.
// https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
func (s *Server) inPublishSpan(ctx context.Context, commit func() error) error {
	_, span := s.tracer.Start(ctx, "publish outbox_events", publishOptions...)
	defer span.End()
	err := commit()
	if err != nil && span.IsRecording() {
		kind := problemOf(ctx, err).Kind
		span.SetAttributes(semconv.ErrorTypeKey.String(kind.Slug))
		if kind.Status >= http.StatusInternalServerError {
			span.SetStatus(codes.Error, "")
		}
	}
	return err
}
