package chserver

import (
	"strings"

	"github.com/ClickHouse/ch-go/proto"
)

// statement holds the facts about an SQL statement that the server needs before
// it runs. libchdb takes the data of an INSERT separately from its text.
type statement struct {
	// verb is the first word, in capitals, or an opening parenthesis.
	verb string
	// sql is the statement without its FORMAT clause. For an INSERT with data
	// it is the part before VALUES or FORMAT.
	sql string
	// format is the format named by FORMAT or VALUES, or "".
	format string
	// takesData reports whether the statement is an INSERT whose rows the
	// client sends.
	takesData bool
	// dataStart is the position of these rows in the statement's text.
	dataStart int
	// target is the table or table function of the INSERT. columns is the list of
	// columns in the INSERT, with the parentheses, or "".
	target, columns string
	// settings is the position of the INSERT's list of settings, or 0.
	settings int
}

// parseStatement parses only words, quotes, comments and brackets. The engine
// parses the grammar.
func parseStatement(text string) (statement, error) {
	l := &lexer{text: text}
	first := l.next()
	if first.text == "" {
		return statement{}, newException(proto.ErrSyntaxError, "SYNTAX_ERROR",
			"Syntax error: failed at position 1 (end of query): Empty query")
	}
	s := statement{verb: strings.ToUpper(first.text), sql: text}
	if s.verb == "INSERT" {
		s.parseInsert(l)
		return s, nil
	}

	// The lexer has read the parenthesis that opens this statement. Skip the rest
	// of its group.
	if s.verb == "(" {
		l.skipGroup()
	}
	for t := l.next(); t.text != ""; t = l.next() {
		switch {
		case isOpening(t):
			l.skipGroup()
		case t.text == ";":
			if rest := l.next(); rest.text != "" {
				return statement{}, newException(proto.ErrSyntaxError, "SYNTAX_ERROR",
					"Syntax error (Multi-statements are not allowed): failed at position %d", rest.start+1)
			}
			s.sql = s.sql[:t.start]
		case t.is("FORMAT"):
			// A column can also be named FORMAT; then other tokens follow.
			after := *l
			name := after.next()
			if end := after.peek(); name.text != "" && (end.text == "" || end.text == ";" || end.is("SETTINGS")) {
				s.format = name.text
				// Spaces preserve the positions in the engine's messages.
				s.sql = text[:t.start] + strings.Repeat(" ", name.end()-t.start) + text[name.end():]
				*l = after
			}
		}
	}
	return s, nil
}

// parseInsert parses the statement after the word INSERT.
func (s *statement) parseInsert(l *lexer) {
	t := l.next()
	for t.is("INTO") || t.is("TABLE") {
		t = l.next()
	}
	start := t.start
	isFunction := t.is("FUNCTION") && l.peek().text != "("
	if isFunction {
		start = l.peek().start
		l.next()
		if l.peek().text == "(" {
			l.next()
			l.skipGroup()
		}
	} else {
		if isOpening(t) { // a parameter: {table:Identifier}
			l.skipGroup()
		}
		for l.peek().text == "." {
			l.next()
			if isOpening(l.next()) {
				l.skipGroup()
			}
		}
	}
	s.target = l.text[start:l.position]

	for t = l.next(); t.text != ""; t = l.next() {
		switch {
		case t.text == "(":
			if inner := l.peek(); inner.is("SELECT") || inner.is("WITH") {
				return
			}
			l.skipGroup()
			if s.columns == "" {
				s.columns = l.text[t.start:l.position]
			}
		case isOpening(t):
			l.skipGroup()
		case t.is("SELECT"), t.is("WITH"), t.is("FROM"), t.is("WATCH"):
			return
		case t.is("SETTINGS"):
			s.settings = t.end()
		case t.is("VALUES"):
			s.takeData(l.text[:t.start], "Values", t.end())
			return
		case t.is("FORMAT"):
			name := l.next()
			s.takeData(l.text[:t.start], name.text, skipLineEnd(l.text, name.end()))
			return
		case t.text == ";":
			s.takeData(l.text[:t.start], "", len(l.text))
			return
		}
	}
	s.takeData(l.text, "", len(l.text))
}

func (s *statement) takeData(sql, format string, start int) {
	s.takesData, s.sql, s.format, s.dataStart = true, sql, format, start
}

// withSettings returns the text of the statement, an INSERT with data, with
// additional settings. The statement's own settings take precedence.
func (s *statement) withSettings(settings string) string {
	switch {
	case settings == "":
		return s.sql
	case s.settings > 0:
		return s.sql[:s.settings] + " " + settings + "," + s.sql[s.settings:]
	default:
		return s.sql + "\nSETTINGS " + settings // on a new line, because a comment may precede it
	}
}

// returnsRows reports whether a client may expect columns even if the result
// has no rows.
func (s *statement) returnsRows() bool {
	switch s.verb {
	case "SELECT", "WITH", "FROM", "(", "SHOW", "DESCRIBE", "DESC", "EXISTS", "EXPLAIN", "CHECK":
		return true
	default:
		return false
	}
}

// skipLineEnd skips the separator between the name of a format and the data:
// spaces, then one line end.
func skipLineEnd(text string, position int) int {
	for position < len(text) && strings.IndexByte(" \t\f", text[position]) >= 0 {
		position++
	}
	for _, c := range []byte("\r\n") {
		if position < len(text) && text[position] == c {
			position++
		}
	}
	return position
}

func isOpening(t token) bool {
	return t.text == "(" || t.text == "[" || t.text == "{"
}
