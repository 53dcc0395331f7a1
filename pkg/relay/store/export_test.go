package store

import "time"

// SetWatermarkTrail sets how long the low watermark stays below what was cut.
func (s *Store) SetWatermarkTrail(trail time.Duration) { s.watermarkTrail = trail }
