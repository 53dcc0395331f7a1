package problem

import "net/http"

// The kinds of problems that the API has. docs/errors.md explains each of them to
// clients.
var (
	MalformedRequest = &Kind{
		Slug: "malformed-request", Status: http.StatusBadRequest, Title: "Malformed request",
		Detail: "The request could not be read",
	}
	InvalidJSON = &Kind{
		Slug: "invalid-json", Status: http.StatusBadRequest, Title: "Invalid JSON",
		Detail: "The body is not valid JSON",
	}
	Unauthorized = &Kind{
		Slug: "unauthorized", Status: http.StatusUnauthorized, Title: "Unauthorized",
		Detail: "This needs an API key that the server knows, as Authorization: Bearer KEY",
	}
	RateLimited = &Kind{
		Slug: "rate-limited", Status: http.StatusTooManyRequests, Title: "Rate limited",
		Detail: "Too many requests; the headers Retry-After and RateLimit say when to go on",
	}
	Overloaded = &Kind{
		Slug: "overloaded", Status: http.StatusServiceUnavailable, Title: "Overloaded",
		Detail: "More requests are being worked on than the server takes; nothing was changed", RetryAfter: 1,
	}
	NotFound = &Kind{
		Slug: "not-found", Status: http.StatusNotFound, Title: "Not found",
		Detail: "There is nothing at this path",
	}
	UserNotFound = &Kind{
		Slug: "user-not-found", Status: http.StatusNotFound, Title: "User not found",
		Detail: "There is no user with this id",
	}
	MethodNotAllowed = &Kind{
		Slug: "method-not-allowed", Status: http.StatusMethodNotAllowed, Title: "Method not allowed",
		Detail: "This path does not have the method; the Allow header lists those that it has",
	}
	RequestTimeout = &Kind{
		Slug: "request-timeout", Status: http.StatusRequestTimeout, Title: "Request timeout",
		Detail: "The request's body took too long to arrive",
	}
	InvalidIdempotencyKey = &Kind{
		Slug: "invalid-idempotency-key", Status: http.StatusBadRequest, Title: "Invalid idempotency key",
		Detail: "The Idempotency-Key header must come once and have from 1 to 255 printable ASCII characters, in double quotes or without spaces",
	}
	IdempotencyKeyInUse = &Kind{
		Slug: "idempotency-key-in-use", Status: http.StatusConflict, Title: "Idempotency key in use",
		Detail: "A request with this idempotency key is being worked on; repeat this one to get its answer", RetryAfter: 1,
	}
	IdempotencyKeyReused = &Kind{
		Slug: "idempotency-key-reused", Status: http.StatusUnprocessableEntity, Title: "Idempotency key reused",
		Detail: "This idempotency key was used for another request; take a new key for each change",
	}
	EmailTaken = &Kind{
		Slug: "email-taken", Status: http.StatusConflict, Title: "E-mail address taken",
		Detail: "User with this email already exists",
	}
	BodyTooLarge = &Kind{
		Slug: "body-too-large", Status: http.StatusRequestEntityTooLarge, Title: "Body too large",
		Detail: "The request's body is larger than this API takes",
	}
	UnsupportedMediaType = &Kind{
		Slug: "unsupported-media-type", Status: http.StatusUnsupportedMediaType, Title: "Unsupported media type",
		Detail: "The body must be sent as Content-Type: application/json, in UTF-8 and without a Content-Encoding",
	}
	ValidationFailed = &Kind{
		Slug: "validation-failed", Status: http.StatusUnprocessableEntity, Title: "Validation failed",
		Detail: "Values in the request break a rule; errors lists them",
	}
	// ClientGone is not sent to anybody. It stands in the log and the metrics;
	// the status is nginx's.
	ClientGone    = &Kind{Slug: "client-gone", Status: 499}
	InternalError = &Kind{
		Slug: "internal-error", Status: http.StatusInternalServerError, Title: "Internal error",
		Detail: "Something went wrong on the server; its log has more under the request id",
	}
	Unavailable = &Kind{
		Slug: "unavailable", Status: http.StatusServiceUnavailable, Title: "Temporarily unavailable",
		Detail: "The database is not available; nothing was changed", RetryAfter: 1,
	}
	OutcomeUnknown = &Kind{
		Slug: "outcome-unknown", Status: http.StatusServiceUnavailable, Title: "Outcome unknown",
		Detail: "The database was lost while the change was being committed: it was made in whole or not at all", RetryAfter: 1,
	}
	Timeout = &Kind{
		Slug: "timeout", Status: http.StatusGatewayTimeout, Title: "Timeout",
		Detail: "The request took too long and was given up; nothing was changed", RetryAfter: 1,
	}
)
