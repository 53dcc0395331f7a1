package chaos_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// request is a request to the API. mutate replaces knownID and knownEmail with those of one
// of knownUsers users.
type request struct {
	method, path string
	headers      map[string]string
	body         []byte
}

const (
	knownUsers = 1000
	idPrefix   = "019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6"
	knownID    = idPrefix + "000"
	knownEmail = "user-000@example.com"

	userBody = `{"email":"` + knownEmail + `","first_name":"Ada","last_name":"Lovelace"}`
	anEvent  = `{"event_id":"` + knownID + `","event_type":"a","event_context":{"a":[1,"ä",null]},` +
		`"event_date_time":"2026-01-31T12:00:00Z","metadata_version":1}`
)

// validRequests are the requests that mutate changes.
var validRequests = []request{
	{http.MethodPost, "/v1/users", jsonHeaders, []byte(userBody)},
	{http.MethodPost, "/v1/users/batch", jsonHeaders, []byte(`{"data":[` + userBody + `,{"email":"bob@example.com"}]}`)},
	{http.MethodPatch, "/v1/users/batch?atomic=true", jsonHeaders, []byte(`{"data":[{"id":"` + knownID + `","first_name":null}]}`)},
	{http.MethodPost, "/v1/users/batch/delete", jsonHeaders, []byte(`{"data":[{"id":"` + knownID + `"}]}`)},
	{http.MethodPatch, "/v1/users/" + knownID, jsonHeaders, []byte(userBody)},
	{http.MethodDelete, "/v1/users/" + knownID, jsonHeaders, nil},
	{http.MethodGet, "/v1/users/" + knownID, nil, nil},
	{http.MethodGet, "/v1/users?limit=10&email=ada%40example.com&cursor=AAAAAAAAAAAAAAAAAAAAAA", nil, nil},
	{http.MethodPost, "/v1/events", jsonHeaders, []byte(anEvent)},
	{http.MethodPost, "/v1/events/batch?atomic=false", jsonHeaders, []byte(`{"data":[` + anEvent + `]}`)},
	{http.MethodGet, "/openapi.json", nil, nil},
	{http.MethodGet, "/docs/swagger-ui-bundle.js", map[string]string{"Accept-Encoding": "identity"}, nil},
}

var jsonHeaders = map[string]string{"Content-Type": "application/json", "Idempotency-Key": "a", "If-Match": `"1764403200000000"`}

// mutate returns the request with a few random changes. A request in a hundred gets a body
// of up to 16 MiB.
func mutate(random *rand.Rand, r request) request {
	r.headers, r.body = maps.Clone(r.headers), bytes.Clone(r.body)
	suffix := fmt.Sprintf("%03d", random.IntN(knownUsers))
	r.path = strings.ReplaceAll(r.path, knownID, idPrefix+suffix)
	r.body = bytes.ReplaceAll(r.body, []byte(knownID), []byte(idPrefix+suffix))
	r.body = bytes.ReplaceAll(r.body, []byte(knownEmail), fmt.Appendf(nil, "user-%d@example.com", random.IntN(2*knownUsers)))
	for range random.IntN(4) {
		switch random.IntN(6) {
		case 0:
			methods := []string{"GET", "HEAD", "POST", "PATCH", "DELETE", "PUT", "OPTIONS", "X"}
			r.method = methods[random.IntN(len(methods))]
		case 1:
			r.path = "/" + string(mutateText(random, []byte(r.path[1:])))
		case 2:
			names := slices.Sorted(maps.Keys(r.headers))
			if len(names) > 0 {
				name := names[random.IntN(len(names))]
				r.headers[name] = string(mutateText(random, []byte(r.headers[name])))
			}
		default:
			r.body = mutateText(random, r.body)
		}
	}
	if len(r.headers["Idempotency-Key"]) == 1 { // seldom the key of another request
		r.headers["Idempotency-Key"] = fmt.Sprint(random.IntN(100_000))
	}
	if random.IntN(100) == 0 && len(r.body) > 0 {
		from := random.IntN(len(r.body))
		part := r.body[from : from+1+random.IntN(len(r.body)-from)]
		times := random.IntN(16<<20) / len(part)
		r.body = slices.Concat(r.body[:from], bytes.Repeat(part, times), r.body[from:])
	}
	return r
}

// mutateText replaces, inserts, removes or repeats a part of the text.
func mutateText(random *rand.Rand, text []byte) []byte {
	from := random.IntN(len(text) + 1)
	to := from + random.IntN(min(len(text)-from, 8)+1)
	parts := []string{
		"", "\x00", `"`, `\`, "{", "[", "]", ",", ":", "null", "1e400", "-0", "9223372036854775808", "\xff", "é", "\u202e", `\ud800`, "%00", "%", "/", "?", "&",
		strings.Repeat("[", 600), strings.Repeat("a", 300), "\x80", "\x1b", string(text[from:to]) + string(text[from:to]),
	}
	return slices.Concat(text[:from], []byte(parts[random.IntN(len(parts))]), text[to:])
}

var _ = Describe("Chaos by requests", Serial, Label("long"), func() {
	const clients, enough, mib = 16, 2_000, 1 << 20

	It("neither ends the API, nor makes it fail or need more than 512 MiB", func(ctx SpecContext) {
		s := newSystem(ctx)
		s.Postgres.MustExec(`INSERT INTO users (id, email, created_at, updated_at)
			SELECT ($1 || lpad(n::text, 3, '0'))::uuid, 'user-' || n || '@example.com', now(), now() FROM generate_series(0, $2 - 1) n`, idPrefix, knownUsers)
		api := s.API("LOG_LEVEL=warn") // without a record for each request
		began := time.Now()
		var sent atomic.Int64
		var mu sync.Mutex
		statuses := map[int]int{}
		var group sync.WaitGroup
		for client := range uint64(clients) {
			random := rand.New(rand.NewPCG(uint64(GinkgoRandomSeed()), client)) //nolint:gosec // the same requests for the same seed
			group.Go(func() {
				defer GinkgoRecover()
				for (sent.Add(1) <= enough || time.Since(began) < chaosDuration) && ctx.Err() == nil {
					r := mutate(random, validRequests[random.IntN(len(validRequests))])
					status := r.send(ctx, api.URL())
					if status >= http.StatusInternalServerError && status != http.StatusServiceUnavailable {
						Fail(fmt.Sprintf("%s %q %q with a body of %d bytes, %.1000q: status %d", r.method, r.path, r.headers, len(r.body), r.body, status))
					}
					mu.Lock()
					statuses[status]++
					mu.Unlock()
				}
			})
		}
		group.Wait()
		peak := peakMemory(api)
		AddReportEntry("requests", ReportEntryVisibilityAlways, fmt.Sprintf("seed %d: peak memory %d MiB, responses after %s: %v",
			GinkgoRandomSeed(), peak/mib, time.Since(began).Round(time.Second), statuses))
		Expect(peak).To(BeNumerically("<=", 512*mib))
		for _, status := range []int{http.StatusOK, http.StatusCreated, http.StatusAccepted, http.StatusNoContent, http.StatusBadRequest, http.StatusUnprocessableEntity} {
			Expect(statuses).To(HaveKey(status), "the requests reach every step")
		}
		Expect(api.Ready()).To(Equal(http.StatusOK))
	})
})

// send sends the request, and returns the status of the response. It returns 0 if the
// client refuses the request, or if the server closed the connection before it had read the
// request.
func (r request) send(ctx context.Context, url string) int {
	request, err := http.NewRequestWithContext(ctx, r.method, url+r.path, bytes.NewReader(r.body))
	if err != nil {
		return 0
	}
	for name, value := range r.headers {
		request.Header.Set(name, value)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0
	}
	defer response.Body.Close()
	_, _ = io.Copy(io.Discard, response.Body)
	return response.StatusCode
}
