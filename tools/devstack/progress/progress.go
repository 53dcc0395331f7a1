// Package progress reports on a long task where no terminal shows it.
package progress

import (
	"fmt"
	"io"
	"time"
)

// EveryMinute writes a line to out every minute until stop is called: the status
// at that moment and the time since the call. It calls status in a goroutine of
// its own. Stop returns when that goroutine has ended, and must be called once.
// A nil out is silence.
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

// atEach is EveryMinute with ticks for minutes.
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
