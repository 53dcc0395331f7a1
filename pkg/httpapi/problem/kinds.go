package problem

import "net/http"

// The kinds of problems of the API. docs/errors.md explains each kind to clients.
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
		Detail: "The API key is missing or unknown; send it as Authorization: Bearer KEY",
	}
	InsufficientScope = &Kind{
		Slug: "insufficient-scope", Status: http.StatusForbidden, Title: "Insufficient scope",
		Detail: "The API key has no right to this request",
	}
	RateLimited = &Kind{
		Slug: "rate-limited", Status: http.StatusTooManyRequests, Title: "Rate limited",
		Detail: "Too many requests; repeat this one after Retry-After",
	}
	Overloaded = &Kind{
		Slug: "overloaded", Status: http.StatusServiceUnavailable, Title: "Overloaded",
		Detail: "Too many requests are in progress; nothing was changed", RetryAfter: 1,
	}
	NotFound = &Kind{
		Slug: "not-found", Status: http.StatusNotFound, Title: "Not found",
		Detail: "This path does not exist",
	}
	UserNotFound = &Kind{
		Slug: "user-not-found", Status: http.StatusNotFound, Title: "User not found",
		Detail: "No user has this id",
	}
	MethodNotAllowed = &Kind{
		Slug: "method-not-allowed", Status: http.StatusMethodNotAllowed, Title: "Method not allowed",
		Detail: "This path does not support the method; the Allow header lists the supported methods",
	}
	RequestTimeout = &Kind{
		Slug: "request-timeout", Status: http.StatusRequestTimeout, Title: "Request timeout",
		Detail: "The request's body took too long to arrive",
	}
	MisdirectedRequest = &Kind{
		Slug: "misdirected-request", Status: http.StatusMisdirectedRequest, Title: "Misdirected request",
		Detail: "Without authentication, the API serves only requests to localhost",
	}
	InvalidIdempotencyKey = &Kind{
		Slug: "invalid-idempotency-key", Status: http.StatusBadRequest, Title: "Invalid idempotency key",
		Detail: "Send at most one Idempotency-Key header, with 1 to 255 printable ASCII characters, in double quotes or without spaces",
	}
	IdempotencyKeyInUse = &Kind{
		Slug: "idempotency-key-in-use", Status: http.StatusConflict, Title: "Idempotency key in use",
		Detail: "A request with this idempotency key is in progress; repeat this request to get its response", RetryAfter: 1,
	}
	IdempotencyKeyReused = &Kind{
		Slug: "idempotency-key-reused", Status: http.StatusUnprocessableEntity, Title: "Idempotency key reused",
		Detail: "This idempotency key was used for another request; use a new key for each change",
	}
	EmailTaken = &Kind{
		Slug: "email-taken", Status: http.StatusConflict, Title: "E-mail address taken",
		Detail: "User with this email already exists",
	}
	PreconditionFailed = &Kind{
		Slug: "precondition-failed", Status: http.StatusPreconditionFailed, Title: "Precondition failed",
		Detail: "The user has changed since the version in If-Match; nothing was changed",
	}
	BodyTooLarge = &Kind{
		Slug: "body-too-large", Status: http.StatusRequestEntityTooLarge, Title: "Body too large",
		Detail: "The request's body is too large",
	}
	UnsupportedMediaType = &Kind{
		Slug: "unsupported-media-type", Status: http.StatusUnsupportedMediaType, Title: "Unsupported media type",
		Detail: "The body has a media type that this path does not support",
	}
	ValidationFailed = &Kind{
		Slug: "validation-failed", Status: http.StatusUnprocessableEntity, Title: "Validation failed",
		Detail: "The request contains invalid values; see the list of errors",
	}
	// ClientGone is for logs and metrics. No client receives it. nginx uses the same
	// status.
	ClientGone    = &Kind{Slug: "client-gone", Status: 499}
	InternalError = &Kind{
		Slug: "internal-error", Status: http.StatusInternalServerError, Title: "Internal error",
		Detail: "The server failed; its log has the cause under the request id",
	}
	Unavailable = &Kind{
		Slug: "unavailable", Status: http.StatusServiceUnavailable, Title: "Temporarily unavailable",
		Detail: "The database is unavailable; nothing was changed", RetryAfter: 1,
	}
	Locked = &Kind{
		Slug: "locked", Status: http.StatusServiceUnavailable, Title: "Locked",
		Detail: "Another transaction locks or changes what this request needs; nothing was changed", RetryAfter: 1,
	}
	OutboxFull = &Kind{
		Slug: "outbox-full", Status: http.StatusServiceUnavailable, Title: "Outbox full",
		Detail: "Too many events wait for their delivery; nothing was changed", RetryAfter: 60,
	}
	OutcomeUnknown = &Kind{
		Slug: "outcome-unknown", Status: http.StatusServiceUnavailable, Title: "Outcome unknown",
		Detail: "The connection to the database was lost during the commit; the change was made completely or not at all", RetryAfter: 1,
	}
	Timeout = &Kind{
		Slug: "timeout", Status: http.StatusGatewayTimeout, Title: "Timeout",
		Detail: "The request timed out; nothing was changed", RetryAfter: 1,
	}
)
