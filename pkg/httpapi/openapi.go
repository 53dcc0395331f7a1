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

// openAPI describes the API for people and generators. It is written by hand;
// the specs hold it and every answer of the server against each other.
//
//go:embed openapi.json
var openAPI []byte

// docsFiles are the page that shows the document. Swagger UI's files are
// compressed, and come from docs/update.sh.
//
//go:embed docs/index.html docs/page.js docs/*.gz
var docsFiles embed.FS

// docsPolicy has the browser itself forbid what is not from this server. Images
// that are part of Swagger UI's style are data.
const docsPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// cacheForAnHour is for what is the same for everybody and changes with a
// release only.
const cacheForAnHour = "public, max-age=3600"

func (s *Server) getOpenAPI(c echo.Context) error {
	c.Response().Header().Set(echo.HeaderCacheControl, cacheForAnHour)
	return writeBody(c, http.StatusOK, echo.MIMEApplicationJSON, openAPI)
}

// docsFile answers with a file of the page. A file that is embedded compressed is
// sent as it is, or unpacked once for all clients that do not accept gzip. Echo's
// gzip would compress 1.7 MB for each request, and ignores gzip;q=0.
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
			return fmt.Errorf("read the page: %w", err)
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

// acceptsGzip reports whether the client names gzip, and not to refuse it.
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
		return nil, err //nolint:wrapcheck // the caller says of what
	}
	return io.ReadAll(reader) //nolint:wrapcheck // the caller says of what
}
