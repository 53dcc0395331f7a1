package chserver

import (
	"strings"

	"github.com/ClickHouse/ch-go/proto"
)

// statement is what has to be known of an SQL statement before the engine gets
// it: libchdb takes the data of an INSERT separately from its text.
type statement struct {
	// verb is the first word, in capitals, or an opening parenthesis.
	verb string
	// sql is the statement without its FORMAT clause; of an INSERT with data,
	// what stands before VALUES or FORMAT.
	sql string
	// format is what FORMAT or VALUES asks for, or "".
	format string
	// takesData says that it is an INSERT whose rows the client sends.
	takesData bool
	// dataStart is where the data begin in the text of such an INSERT.
	dataStart int
	// target is its table or table function, columns its list of columns with
	// the parentheses, or "".
	target, columns string
	// settings is where its list of settings begins, or 0.
	settings int
}

// parseStatement looks no further than it has to: words, quotes, comments and
// brackets. The grammar is the engine's.
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

	// In one of a row, the parenthesis that was read opens a group.
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
			// A column can have that name too; then something else follows.
			after := *l
			name := after.next()
			if end := after.peek(); name.text != "" && (end.text == "" || end.text == ";" || end.is("SETTINGS")) {
				s.format = name.text
				// Blanks keep the positions in the engine's messages right.
				s.sql = text[:t.start] + strings.Repeat(" ", name.end()-t.start) + text[name.end():]
				*l = after
			}
		}
	}
	return s, nil
}

// parseInsert reads on behind the word INSERT.
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

// withSettings gives the text of an INSERT with data, with settings that yield
// to its own.
func (s *statement) withSettings(settings string) string {
	switch {
	case settings == "":
		return s.sql
	case s.settings > 0:
		return s.sql[:s.settings] + " " + settings + "," + s.sql[s.settings:]
	default:
		return s.sql + "\nSETTINGS " + settings // on a line of its own, for a comment before it
	}
}

// returnsRows says whether a client may expect columns even where there are
// no rows.
func (s *statement) returnsRows() bool {
	switch s.verb {
	case "SELECT", "WITH", "FROM", "(", "SHOW", "DESCRIBE", "DESC", "EXISTS", "EXPLAIN", "CHECK":
		return true
	default:
		return false
	}
}

// skipLineEnd skips what may separate the name of a format from the data:
// blanks, then one end of line.
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
