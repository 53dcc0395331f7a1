package relay

import "sync"

// transition finds the changes of a condition, so that each change is logged once.
type transition struct {
	mu sync.Mutex
	on bool
}

// to returns whether the condition has changed.
func (t *transition) to(on bool) (changed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	changed = t.on != on
	t.on = on
	return changed
}
