package httpapi

import (
	_ "embed"
	"net/http"

	"github.com/labstack/echo/v4"
)

// openAPI describes the API for people and generators. It is written by hand;
// the specs hold it and every answer of the server against each other.
//
//go:embed openapi.json
var openAPI []byte

// cacheForAnHour is for what is the same for everybody and changes with a
// release only.
const cacheForAnHour = "public, max-age=3600"

func (s *Server) getOpenAPI(c echo.Context) error {
	c.Response().Header().Set(echo.HeaderCacheControl, cacheForAnHour)
	return writeBody(c, http.StatusOK, echo.MIMEApplicationJSON, openAPI)
}
