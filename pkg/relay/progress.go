package relay

import (
	"math"

	dto "github.com/prometheus/client_model/go"
)

// Progress is what a relay has delivered since it started.
type Progress struct {
	// Events is the number of delivered events.
	Events uint64
	// Latency has the delivered events by the time from their publishing to their
	// acknowledgement by the sink, as the histogram diehard_relay_delivery_seconds.
	Latency []LatencyBucket
}

// LatencyBucket is a bucket of a histogram.
type LatencyBucket struct {
	UpTo   float64 // seconds; infinite for the last bucket
	Events uint64  // of this bucket only
}

// Progress returns what the relay has delivered. It is safe for concurrent use.
func (r *Relay) Progress() Progress {
	var read dto.Metric
	if err := r.metrics.delivery.Write(&read); err != nil {
		return Progress{} // only an invalid native histogram has an error
	}
	histogram := read.GetHistogram()
	progress := Progress{Events: histogram.GetSampleCount()}
	var below uint64
	for _, bucket := range histogram.GetBucket() {
		progress.Latency = append(progress.Latency, LatencyBucket{bucket.GetUpperBound(), bucket.GetCumulativeCount() - below})
		below = bucket.GetCumulativeCount()
	}
	if last := len(progress.Latency); last == 0 || !math.IsInf(progress.Latency[last-1].UpTo, 1) {
		progress.Latency = append(progress.Latency, LatencyBucket{math.Inf(1), progress.Events - below})
	}
	return progress
}
