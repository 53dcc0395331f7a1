package chserver

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/google/uuid"

	"github.com/diehard-outbox/diehard/tools/devstack/internal/chengine"
)

// headSize limits the search for the beginning of the data when the query is in
// the body. It is ClickHouse's max_query_size.
const headSize = 256 << 10

// ownParameters lists the URL parameters that are not settings.
var ownParameters = []string{
	"query", "query_id", "database", "default_format", "user", "password", "quota_key",
	"compress", "decompress", "client_protocol_version", "wait_end_of_query", "buffer_size", "stacktrace",
}

// handler returns the HTTP interface
// (https://clickhouse.com/docs/interfaces/http).
func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	ok := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=UTF-8")
		_, _ = io.WriteString(w, "Ok.\n")
	}
	mux.HandleFunc("/ping", ok)
	mux.HandleFunc("/replicas_status", ok)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery == "" {
			ok(w, r)
			return
		}
		s.serveQuery(w, r)
	})
	mux.HandleFunc("/{$}", s.serveQuery)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "There is no handle "+r.URL.Path+"\n\nUse / or /ping for health checks.\nSend queries to /.", http.StatusNotFound)
	})
	return mux
}

func (s *Server) serveQuery(w http.ResponseWriter, r *http.Request) {
	r.Body = impatientBody{r.Body, http.NewResponseController(w)}
	q := readRequest(r)
	response := newResponse(w, r, q)
	response.identify(s.version)
	err := s.credentials.check(q.user, q.password)
	if err == nil {
		err = s.answer(r, q, response)
	}
	response.end(s.version, err)
}

// request holds the content of a request's URL and headers.
type request struct {
	user, password       string
	id                   string
	text                 string
	database             string
	format               string
	settings             []setting
	parameters           []chengine.Parameter
	protocol             int
	compress, decompress bool
	compressionMethod    string
	wait                 bool
	tables               url.Values
}

func readRequest(r *http.Request) *request {
	values := r.URL.Query()
	basicUser, basicPassword, _ := r.BasicAuth()
	q := &request{
		user:              cmp.Or(r.Header.Get("X-ClickHouse-User"), basicUser, values.Get("user")),
		password:          cmp.Or(r.Header.Get("X-ClickHouse-Key"), basicPassword, values.Get("password")),
		id:                cmp.Or(values.Get("query_id"), uuid.NewString()),
		text:              values.Get("query"),
		database:          cmp.Or(r.Header.Get("X-ClickHouse-Database"), values.Get("database")),
		format:            cmp.Or(r.Header.Get("X-ClickHouse-Format"), values.Get("default_format")),
		compress:          isTrue(values.Get("compress")),
		decompress:        isTrue(values.Get("decompress")),
		compressionMethod: values.Get("network_compression_method"),
		wait:              isTrue(values.Get("wait_end_of_query")),
		tables:            values,
	}
	// Later revisions do not change blocks.
	protocol, err := strconv.Atoi(values.Get("client_protocol_version"))
	if err == nil {
		q.protocol = min(protocol, proto.Version)
	}

	isMultipart := strings.HasPrefix(r.Header.Get("Content-Type"), "multipart/form-data")
	for name, of := range values {
		switch {
		case strings.HasPrefix(name, "param_"):
			q.parameters = append(q.parameters, chengine.Parameter{Name: strings.TrimPrefix(name, "param_"), Value: of[0]})
		case slices.Contains(ownParameters, name):
		case isMultipart && (strings.HasSuffix(name, "_format") || strings.HasSuffix(name, "_structure")):
		default:
			q.settings = append(q.settings, setting{name: name, value: of[0]})
		}
	}
	// Like in ClickHouse, a GET must not change anything.
	if r.Method != http.MethodPost && r.Method != http.MethodPut && !values.Has("readonly") {
		q.settings = append(q.settings, setting{name: "readonly", value: "2"})
	}
	return q
}

func isTrue(value string) bool {
	return value == "1" || value == "true"
}

// answer runs the request's query in a session of its own.
func (s *Server) answer(r *http.Request, q *request, response *response) error {
	session, err := s.engine.NewSession()
	if err != nil {
		return err
	}
	defer session.Close()

	ctx := r.Context()
	if err := use(ctx, session, q.database); err != nil {
		return err
	}
	if err := setAll(ctx, session, q.settings); err != nil {
		return err
	}
	body, err := s.body(ctx, r, q, session)
	if err != nil {
		return err
	}

	parsed, data, err := readStatement(q.text, body)
	if err != nil {
		return err
	}
	defer s.ran(parsed)
	query := chengine.Statement{SQL: parsed.sql, Parameters: q.parameters}
	if parsed.takesData {
		query.Format = cmp.Or(parsed.format, q.format, "Values")
		stats, err := insertFrom(ctx, session, query, data)
		response.stats = stats
		return err
	}

	query.Format = cmp.Or(parsed.format, q.format, "TabSeparated")
	return s.writeResult(ctx, session, query, q, response)
}

// body returns the decompressed body of a request. If the body is a form, it
// loads the form's tables, stores the query in the request, and returns no
// body.
func (s *Server) body(ctx context.Context, r *http.Request, q *request, session *chengine.Session) (io.Reader, error) {
	body, err := decodeContent(r.Header.Get("Content-Encoding"), r.Body)
	if err != nil {
		return nil, err
	}
	if q.decompress {
		body = newFrameReader(body)
	}
	if !strings.HasPrefix(r.Header.Get("Content-Type"), "multipart/form-data") {
		return body, nil
	}

	r.Body = io.NopCloser(body)
	form, err := r.MultipartReader()
	if err != nil {
		return nil, asException(err)
	}
	for {
		part, err := form.NextPart()
		if errors.Is(err, io.EOF) {
			return strings.NewReader(""), nil
		}
		if err != nil {
			return nil, asException(err)
		}
		name := part.FormName()
		if part.FileName() != "" {
			if err := loadExternalTable(ctx, session, q, name, part); err != nil {
				return nil, err
			}
			continue
		}
		value, err := io.ReadAll(part)
		if err != nil {
			return nil, asException(err)
		}
		switch {
		case name == "query":
			q.text += string(value)
		case strings.HasPrefix(name, "param_"):
			q.parameters = append(q.parameters, chengine.Parameter{Name: strings.TrimPrefix(name, "param_"), Value: string(value)})
		default:
			return nil, newException(proto.ErrUnknownSetting, "UNKNOWN_SETTING", "Unknown form field '%s'", name)
		}
	}
}

func loadExternalTable(ctx context.Context, session *chengine.Session, q *request, name string, data io.Reader) error {
	format := cmp.Or(q.tables.Get(name+"_format"), "TabSeparated")
	if err := createExternalTable(ctx, session, name, q.tables.Get(name+"_structure")); err != nil {
		return err
	}
	_, err := insertFrom(ctx, session, chengine.Statement{SQL: "INSERT INTO " + quoteName(name), Format: format}, data)
	return err
}

// readStatement reads a query that begins in the URL and continues in the body.
// It also returns the rest of the body, which is the data of an INSERT.
func readStatement(text string, body io.Reader) (statement, io.Reader, error) {
	if text != "" {
		text += "\n"
		parsed, err := parseStatement(text)
		if err != nil {
			return statement{}, nil, err
		}
		if parsed.takesData && parsed.format != "" {
			return parsed, io.MultiReader(strings.NewReader(text[parsed.dataStart:]), body), nil
		}
	}

	buffered := bufio.NewReaderSize(io.MultiReader(strings.NewReader(text), body), headSize)
	head, err := buffered.Peek(headSize)
	switch {
	case err == nil, errors.Is(err, io.EOF):
	default:
		return statement{}, nil, asException(err)
	}
	parsed, parseErr := parseStatement(string(head))
	if err == nil && parsed.takesData {
		if _, err := buffered.Discard(parsed.dataStart); err != nil {
			return statement{}, nil, asException(err)
		}
		return parsed, buffered, nil
	}
	if err != nil {
		return parsed, strings.NewReader(string(head)[min(parsed.dataStart, len(head)):]), parseErr
	}
	whole, err := io.ReadAll(buffered)
	if err != nil {
		return statement{}, nil, asException(err)
	}
	parsed, err = parseStatement(string(whole))
	return parsed, nil, err
}

// writeResult runs a query and sends its result.
func (s *Server) writeResult(ctx context.Context, session *chengine.Session, query chengine.Statement, q *request, response *response) error {
	run := session.Query
	if q.wait {
		run = session.QueryWhole
	}
	result, err := run(ctx, query)
	if err != nil {
		return err
	}
	defer result.Close()

	response.format = query.Format
	transcode := q.protocol > 0 && strings.EqualFold(query.Format, "Native")
	for {
		piece, err := result.Next()
		response.stats = result.Stats()
		if err != nil {
			return err
		}
		if piece == nil {
			return nil
		}
		if transcode {
			err = s.transcode(piece, q.protocol, func(_ []blockColumn, block []byte) error {
				_, err := response.Write(block)
				return err
			})
		} else {
			_, err = response.Write(piece)
		}
		if err != nil {
			return err
		}
	}
}
