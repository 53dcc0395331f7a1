package demo

import (
	"fmt"
	"io"
	"sync"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/terminal"
)

// progress shows the number of created users and the number of events in ClickHouse. On
// a terminal it draws bars. Otherwise it writes a line after each tenth.
type progress struct {
	bars  *mpb.Progress // nil without a terminal
	users *mpb.Bar
	sunk  *mpb.Bar

	mu                sync.Mutex
	out               io.Writer
	total             int
	doneUsers, shown  int
	doneSunk, shownTo int
}

func newProgress(out io.Writer, total int) *progress {
	p := &progress{out: out, total: total}
	if terminal.Is(out) {
		p.bars = mpb.New(mpb.WithOutput(out), mpb.WithAutoRefresh())
		p.users, p.sunk = p.bar("created"), p.bar("in ClickHouse")
	}
	return p
}

func (p *progress) bar(name string) *mpb.Bar {
	return p.bars.AddBar(int64(p.total),
		mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR)),
		mpb.AppendDecorators(decor.CountersNoUnit("%d of %d", decor.WCSyncSpace), decor.Elapsed(decor.ET_STYLE_GO, decor.WCSyncSpace)))
}

// created counts one more user.
func (p *progress) created() {
	if p.bars != nil {
		p.users.Increment()
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doneUsers++
	p.say("created", p.doneUsers, &p.shown)
}

// arrived sets the number of events in ClickHouse.
func (p *progress) arrived(n int) {
	if p.bars != nil {
		p.sunk.SetCurrent(int64(n))
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doneSunk = n
	p.say("in ClickHouse", p.doneSunk, &p.shownTo)
}

const tenths = 10

// say writes a line after each tenth. The caller holds mu.
func (p *progress) say(what string, done int, shown *int) {
	if tenth := done * tenths / max(p.total, 1); tenth > *shown {
		*shown = tenth
		_, _ = fmt.Fprintf(p.out, "%s: %d of %d\n", what, done, p.total)
	}
}

// finish ends the bars.
func (p *progress) finish(ok bool) {
	if p.bars == nil {
		return
	}
	for _, bar := range []*mpb.Bar{p.users, p.sunk} {
		if ok {
			bar.SetCurrent(int64(p.total))
		} else {
			bar.Abort(false)
		}
	}
	p.bars.Wait()
}
