package httpapi_test

import (
	"net/http"
	"strconv"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = Describe("The page of the OpenAPI document", func() {
	DescribeTable("comes compressed where that is taken, and plain otherwise", func(ctx SpecContext, accepted, encoding string) {
		script := start(ctx).get(ctx, "/docs/swagger-ui-bundle.js", "Accept-Encoding: "+accepted)
		Expect(script.status).To(Equal(http.StatusOK))
		Expect(script.header.Get("Content-Encoding")).To(Equal(encoding))
		Expect(script.header.Get("Vary")).To(Equal("Accept-Encoding"))
		Expect(script.header.Get("Content-Type")).To(HavePrefix("text/javascript"))
		if encoding == "" {
			Expect(script.body).To(ContainSubstring("SwaggerUIBundle"))
		} else {
			Expect(len(script.body)).To(BeNumerically("<", 600_000))
		}
	},
		Entry("as browsers ask", "br, gzip;q=0.8", "gzip"),
		Entry("where nothing is asked for", "identity", ""),
		Entry("where it is refused", "gzip;q=0", ""),
	)

	DescribeTable("answers HEAD with the length of GET", func(ctx SpecContext, accepted string) {
		api := start(ctx)
		const path = "/docs/swagger-ui.css"
		get := api.get(ctx, path, "Accept-Encoding: "+accepted)
		head := api.do(ctx, http.MethodHead, path, nil, "Accept-Encoding: "+accepted)
		Expect(head.status).To(Equal(http.StatusOK))
		Expect(head.body).To(BeEmpty())
		Expect(head.header.Get("Content-Length")).To(Equal(strconv.Itoa(len(get.body))))
		Expect(head.header.Get("Content-Encoding")).To(Equal(get.header.Get("Content-Encoding")))
	},
		Entry("when it is compressed", "gzip"),
		Entry("when it is plain", "identity"),
	)

	It("forbids the browser all other hosts", func(ctx SpecContext) {
		page := start(ctx).get(ctx, "/docs")
		Expect(page.header.Get("Content-Security-Policy")).To(SatisfyAll(
			HavePrefix("default-src 'none'"), Not(ContainSubstring("http")), Not(ContainSubstring("*")), Not(ContainSubstring("unsafe"))))
	})
})
