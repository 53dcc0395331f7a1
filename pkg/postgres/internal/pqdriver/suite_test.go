package pqdriver_test

import (
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

func TestPqdriver(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "pqdriver")
}
