package httpapi

import (
	"bytes"
	"compress/gzip"
	"embed"
	"fmt"
	"io"
	"mime"
	"net/http"
	"path"
	"strings"
	"sync"

	"github.com/labstack/echo/v4"
)

// openAPI describes the API for people and generators. It is written by hand. The specs
// check every response of the server against it.
//
//go:embed openapi.json
var openAPI []byte

// docsFiles contains the page that shows the OpenAPI document. docs/update.sh downloads
// and compresses Swagger UI's files.
//
//go:embed docs/index.html docs/page.js docs/*.gz
var docsFiles embed.FS

// docsPolicy makes the browser refuse resources of other hosts. Swagger UI's style
// sheet contains its images as data URLs.
const docsPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// cacheForAnHour is for content that is public and changes only with a release.
const cacheForAnHour = "public, max-age=3600"

func (s *Server) getOpenAPI(c echo.Context) error {
	c.Response().Header().Set(echo.HeaderCacheControl, cacheForAnHour)
	return writeBody(c, http.StatusOK, echo.MIMEApplicationJSON, openAPI)
}

// docsFile returns the handler of one of the page's files. The handler sends a
// compressed file unchanged to clients that accept gzip. For the first client that does
// not accept gzip, it decompresses the file and keeps the result. See
// docs/adr/0011-swagger-ui.md.
func (s *Server) docsFile(name string) echo.HandlerFunc {
	content, err := docsFiles.ReadFile("docs/" + name)
	compressed := err != nil
	if compressed {
		content, err = docsFiles.ReadFile("docs/" + name + ".gz")
	}
	unpacked := sync.OnceValues(func() ([]byte, error) { return gunzip(content) })
	contentType := mime.TypeByExtension(path.Ext(name))
	return func(c echo.Context) error {
		if err != nil { // the file is not embedded
			return fmt.Errorf("read %s: %w", name, err)
		}
		header := c.Response().Header()
		header.Set(echo.HeaderCacheControl, cacheForAnHour)
		header.Set(echo.HeaderContentSecurityPolicy, docsPolicy)
		if !compressed {
			return writeBody(c, http.StatusOK, contentType, content)
		}
		header.Set(echo.HeaderVary, echo.HeaderAcceptEncoding)
		if acceptsGzip(c.Request().Header) {
			header.Set(echo.HeaderContentEncoding, "gzip")
			return writeBody(c, http.StatusOK, contentType, content)
		}
		plain, err := unpacked()
		if err != nil {
			return fmt.Errorf("decompress %s: %w", name, err)
		}
		return writeBody(c, http.StatusOK, contentType, plain)
	}
}

// acceptsGzip reports whether the client names gzip with a weight above 0.
func acceptsGzip(header http.Header) bool {
	for coding := range strings.SplitSeq(header.Get(echo.HeaderAcceptEncoding), ",") {
		name, weight, _ := strings.Cut(strings.ReplaceAll(coding, " ", ""), ";")
		if strings.EqualFold(name, "gzip") {
			return strings.Trim(strings.TrimPrefix(weight, "q="), "0.") != "" || weight == ""
		}
	}
	return false
}

func gunzip(content []byte) ([]byte, error) {
	reader, err := gzip.NewReader(bytes.NewReader(content))
	if err != nil {
		return nil, err //nolint:wrapcheck // the caller names the file
	}
	return io.ReadAll(reader) //nolint:wrapcheck // the caller names the file
}
