package deploy_test

import (
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/prometheus/model/labels"
	staleness "github.com/prometheus/prometheus/model/value"
	"github.com/prometheus/prometheus/tsdb/chunks"
)

const (
	scrapeInterval = 15 * time.Second
	// scrapeTimeout is the default of Prometheus.
	scrapeTimeout = 10 * time.Second
)

// memory stores the samples of scraped programs, like the storage of a server. The storage
// of Prometheus itself would add the clients of several clouds to the suite.
type memory struct {
	mu  sync.Mutex
	all map[uint64]*scraped // by the hash of the labels
}

// scraped is a series of a running program.
type scraped struct {
	labels  labels.Labels
	samples []chunks.Sample
}

func (s *scraped) name() labels.Labels { return s.labels }

func (s *scraped) between(from, to time.Time) []chunks.Sample {
	place := func(at int64) int {
		i, _ := slices.BinarySearchFunc(s.samples, at, func(s chunks.Sample, at int64) int { return int(s.T() - at) })
		return i
	}
	return s.samples[place(from.UnixMilli()):place(to.UnixMilli()+1)]
}

// series returns the series with their samples so far.
func (m *memory) series() (all []series) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.all {
		all = append(all, &scraped{s.labels, slices.Clip(s.samples)})
	}
	return all
}

// endpoint is a program that the server scrapes.
type endpoint struct {
	url    string
	labels map[string]string
	last   []uint64 // the series of the last scrape
}

// scrape scrapes the program until ctx ends.
func (m *memory) scrape(ctx context.Context, t *endpoint) {
	defer GinkgoRecover()
	ticks := time.NewTicker(scrapeInterval)
	defer ticks.Stop()
	for {
		at := time.Now()
		text, err := get(ctx, t.url+"/metrics", scrapeTimeout)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			text = "" // every series ends
		}
		m.store(t, at, text)
		select {
		case <-ctx.Done():
			return
		case <-ticks.C:
		}
	}
}

// store stores the samples of a scrape. A series that the scrape lacks ends, as in
// Prometheus.
func (m *memory) store(t *endpoint, at time.Time, text string) {
	GinkgoHelper()
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []uint64
	for line := range strings.Lines(text) {
		end := strings.LastIndexByte(line, ' ')
		if end < 0 || line[0] == '#' {
			continue
		}
		number, err := strconv.ParseFloat(strings.TrimSpace(line[end:]), 64)
		Expect(err).NotTo(HaveOccurred(), line)
		parsed, err := promQL.ParseMetric(line[:end])
		Expect(err).NotTo(HaveOccurred(), line)
		builder := labels.NewBuilder(parsed)
		for name, text := range t.labels {
			builder.Set(name, text)
		}
		name := builder.Labels()
		if m.all[name.Hash()] == nil {
			m.all[name.Hash()] = &scraped{labels: name}
		}
		m.add(name.Hash(), at, number)
		found = append(found, name.Hash())
	}
	for _, hash := range t.last {
		if !slices.Contains(found, hash) {
			m.add(hash, at, math.Float64frombits(staleness.StaleNaN))
		}
	}
	t.last = found
}

func (m *memory) add(hash uint64, at time.Time, number float64) {
	s := m.all[hash]
	s.samples = append(s.samples, sample{at.UnixMilli(), value{number: number}})
}

// get returns the body of a response with the status 200.
func get(ctx context.Context, url string, timeout time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s", url, response.Status)
	}
	return string(body), err
}
