package httpapi_test

import (
	"net/http"
	"strconv"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = Describe("The page of the OpenAPI document", func() {
	DescribeTable("is compressed if the client accepts gzip, otherwise plain", func(ctx SpecContext, accepted, encoding string) {
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
		Entry("for the header of a browser", "br, gzip;q=0.8", "gzip"),
		Entry("for identity", "identity", ""),
		Entry("for gzip with weight 0", "gzip;q=0", ""),
	)

	DescribeTable("responds to HEAD with the Content-Length of GET", func(ctx SpecContext, accepted string) {
		api := start(ctx)
		const path = "/docs/swagger-ui.css"
		get := api.get(ctx, path, "Accept-Encoding: "+accepted)
		head := api.do(ctx, http.MethodHead, path, nil, "Accept-Encoding: "+accepted)
		Expect(head.status).To(Equal(http.StatusOK))
		Expect(head.body).To(BeEmpty())
		Expect(head.header.Get("Content-Length")).To(Equal(strconv.Itoa(len(get.body))))
		Expect(head.header.Get("Content-Encoding")).To(Equal(get.header.Get("Content-Encoding")))
	},
		Entry("if it is compressed", "gzip"),
		Entry("if it is plain", "identity"),
	)

	It("forbids the browser to load from other hosts", func(ctx SpecContext) {
		page := start(ctx).get(ctx, "/docs")
		Expect(page.header.Get("Content-Security-Policy")).To(SatisfyAll(
			HavePrefix("default-src 'none'"), Not(ContainSubstring("http")), Not(ContainSubstring("*")), Not(ContainSubstring("unsafe"))))
	})
})
