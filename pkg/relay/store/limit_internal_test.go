package store

import (
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = Describe("The limit of the size of batches", func() {
	It("doubles every hour, up to MaxBytes", func() {
		s := New(nil, Options{MaxBytes: 1000})
		Expect(s.maxBytes(time.Now())).To(Equal(int64(1000)))
		Expect(s.LimitBytes(300)).To(BeTrue())
		Expect(s.LimitBytes(300)).To(BeFalse())
		Expect(s.LimitBytes(400)).To(BeFalse(), "a lower limit remains")
		for hours, bytes := range []int64{300, 600, 1000, 1000} {
			Expect(s.maxBytes(s.limit.at.Add(time.Duration(hours) * time.Hour))).To(Equal(bytes))
		}
	})
})
