package page

import (
	"math"
	"slices"
	"sync"
	"time"

	"github.com/diehard-outbox/diehard/pkg/relay"
)

const (
	// sampleInterval is the time between two samples, and keptSamples the number of samples
	// that are kept: one hour.
	sampleInterval = 20 * time.Second
	keptSamples    = 180
)

// sample has the figures of the charts at a time. A figure is NaN if it is unknown.
type sample struct {
	at                  time.Time
	backlog, bytes, age float64 // of the outbox; age in seconds
	rate                float64 // events per second, of this relay since the sample before
	p50, p95, p99       float64 // seconds, of the events that rate counts
}

// history keeps the samples of the last hour.
type history struct {
	mu      sync.Mutex
	samples []sample // the oldest first
	last    relay.Progress
	at      time.Time
}

// add adds a sample of the outbox's figures and of what the relay has delivered.
func (h *history) add(at time.Time, backlog, bytes, age float64, progress relay.Progress) {
	h.mu.Lock()
	defer h.mu.Unlock()
	added := sample{at: at, backlog: backlog, bytes: bytes, age: age, rate: math.NaN(), p50: math.NaN(), p95: math.NaN(), p99: math.NaN()}
	if !h.at.IsZero() {
		added.rate = float64(progress.Events-h.last.Events) / at.Sub(h.at).Seconds()
		delivered := since(progress.Latency, h.last.Latency)
		added.p50, added.p95, added.p99 = quantile(delivered, 0.5), quantile(delivered, 0.95), quantile(delivered, 0.99)
	}
	h.last, h.at = progress, at
	h.samples = append(h.samples, added)
	if len(h.samples) > keptSamples {
		h.samples = h.samples[1:]
	}
}

// hour returns the samples of the last hour.
func (h *history) hour() []sample {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]sample(nil), h.samples...)
}

// growthTime is the time over which the growth of the backlog is measured, and
// leastGrowthTime the least time.
const (
	growthTime      = 15 * time.Minute
	leastGrowthTime = 2 * time.Minute
)

// growth returns by how many bytes the backlog has grown in an hour, from the last minutes.
// It returns false if too few figures are known.
func growth(samples []sample) (bytesPerHour float64, ok bool) {
	var first, last sample
	for _, s := range slices.Backward(samples) {
		if math.IsNaN(s.bytes) {
			continue
		}
		if last.at.IsZero() {
			last = s
		}
		if last.at.Sub(s.at) > growthTime {
			break
		}
		first = s
	}
	duration := last.at.Sub(first.at)
	if duration < leastGrowthTime {
		return 0, false
	}
	return (last.bytes - first.bytes) / duration.Hours(), true
}

// since returns the events that were added to the buckets.
func since(now, before []relay.LatencyBucket) []relay.LatencyBucket {
	added := append([]relay.LatencyBucket(nil), now...)
	for i := range before {
		added[i].Events -= before[i].Events
	}
	return added
}

// quantile estimates a quantile, as Prometheus' histogram_quantile does: events are spread
// evenly in their bucket, and a quantile in the last bucket is the bucket's lower bound.
// It returns NaN if there are no events.
func quantile(buckets []relay.LatencyBucket, q float64) float64 {
	var all uint64
	for _, bucket := range buckets {
		all += bucket.Events
	}
	if all == 0 {
		return math.NaN()
	}
	rank, lower := q*float64(all), 0.0
	for _, bucket := range buckets {
		events := float64(bucket.Events)
		if rank <= events && events > 0 {
			if math.IsInf(bucket.UpTo, 1) {
				return lower
			}
			return lower + (bucket.UpTo-lower)*rank/events
		}
		rank -= events
		lower = bucket.UpTo
	}
	return lower
}
