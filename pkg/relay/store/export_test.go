package store

import "time"

// SetWatermarkTrail sets how long the low watermark waits before it passes an event that
// was cut.
func (s *Store) SetWatermarkTrail(trail time.Duration) { s.watermarkTrail = trail }
