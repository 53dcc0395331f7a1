// Package progress reports on long tasks when the output is not a terminal.
package progress

import (
	"fmt"
	"io"
	"time"
)

// EveryMinute writes one line to out every minute until stop is called: the
// current status and the time since the call. It calls status in its own
// goroutine. The function stop must be called once; it returns when that
// goroutine has ended. If out is nil, EveryMinute does nothing.
func EveryMinute(out io.Writer, status func() string) (stop func()) {
	if out == nil {
		return func() {}
	}
	ticker := time.NewTicker(time.Minute)
	end := atEach(out, status, time.Now(), ticker.C)
	return func() {
		ticker.Stop()
		end()
	}
}

// atEach does the work of EveryMinute with the given ticks.
func atEach(out io.Writer, status func() string, start time.Time, ticks <-chan time.Time) (stop func()) {
	stopped, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case now := <-ticks:
				_, _ = fmt.Fprintf(out, "%s, %s\n", status(), now.Sub(start).Round(time.Second))
			case <-stopped:
				return
			}
		}
	}()
	return func() {
		close(stopped)
		<-ended
	}
}
