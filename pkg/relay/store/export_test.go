package store

import "time"

// SetWatermarkTrail sets the time for which the low watermark stays below the events that
// were cut.
func (s *Store) SetWatermarkTrail(trail time.Duration) { s.watermarkTrail = trail }
