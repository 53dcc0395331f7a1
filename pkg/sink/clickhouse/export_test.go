package clickhouse

// UseOldTimes makes the sinks that are opened later act as if their server only held the
// years 1900 to 2299, as older versions do. restore ends this.
func UseOldTimes() (restore func()) {
	all := timeRanges
	timeRanges = all[len(all)-1:]
	return func() { timeRanges = all }
}
