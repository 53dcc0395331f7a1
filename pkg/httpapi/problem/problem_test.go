package problem_test

import (
	"encoding/json"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/diehard-outbox/diehard/pkg/httpapi/problem"
)

func TestProblem(t *testing.T) {
	RegisterFailHandler(Fail)
	RunSpecs(t, "problem")
}

var _ = Describe("A problem", func() {
	It("has the detail of its kind, and omits empty members", func() {
		text, err := json.Marshal((&problem.Error{Kind: problem.NotFound}).Details(""))
		Expect(err).NotTo(HaveOccurred())
		Expect(text).To(MatchJSON(`{
			"type": "https://github.com/diehard-outbox/diehard/blob/main/docs/errors.md#not-found",
			"title": "Not found", "status": 404, "detail": "This path does not exist"}`))
	})

	It("has its own detail, the request id and the invalid values", func() {
		err := &problem.Error{
			Kind: problem.ValidationFailed, Detail: "other words",
			Values: []problem.Value{problem.InBody("", "must be an object"), problem.InQuery("limit", "must be a whole number")},
		}
		text, marshalErr := json.Marshal(err.Details("r1"))
		Expect(marshalErr).NotTo(HaveOccurred())
		Expect(text).To(MatchJSON(`{
			"type": "https://github.com/diehard-outbox/diehard/blob/main/docs/errors.md#validation-failed",
			"title": "Validation failed", "status": 422, "detail": "other words", "request_id": "r1", "errors": [
				{"pointer": "", "detail": "must be an object"}, {"parameter": "limit", "detail": "must be a whole number"}]}`))
	})

	It("lists at most MaxValues invalid values", func() {
		values := make([]problem.Value, problem.MaxValues+1)
		values[0] = problem.InBody("/first", "is required")
		Expect(problem.Invalid(values...)).To(SatisfyAll(
			HaveField("Kind", problem.ValidationFailed), HaveField("Values", Equal(values[:problem.MaxValues]))))
		Expect(problem.Invalid(values[0]).Values).To(Equal(values[:1]))
	})
})
