// Package deploy_test checks the files of deploy: the alerts, the dashboard, and the
// runbook that belongs to them.
package deploy_test

import (
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

func TestDeploy(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "deploy")
}
