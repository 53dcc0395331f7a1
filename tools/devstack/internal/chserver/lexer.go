package chserver

import "strings"

// token is a word, a number, a quoted text or any other single byte. An empty
// text marks the end.
type token struct {
	text  string
	start int
}

func (t token) end() int {
	return t.start + len(t.text)
}

// is compares the token with a keyword.
func (t token) is(keyword string) bool {
	return strings.EqualFold(t.text, keyword)
}

// lexer splits SQL into tokens. It drops white space and comments.
type lexer struct {
	text     string
	position int
}

// next returns the next token.
func (l *lexer) next() token {
	l.skipBlanks()
	start := l.position
	if start == len(l.text) {
		return token{start: start}
	}
	switch c := l.text[start]; {
	case c == '\'' || c == '"' || c == '`':
		l.skipQuoted(c)
	case c == '$':
		l.skipHeredoc()
	case isWordByte(c):
		for l.position < len(l.text) && isWordByte(l.text[l.position]) {
			l.position++
		}
	default:
		l.position++
	}
	return token{text: l.text[start:l.position], start: start}
}

// peek returns the next token without consuming it.
func (l *lexer) peek() token {
	ahead := *l
	return ahead.next()
}

// skipGroup skips to the end of the group whose opening bracket was just read.
func (l *lexer) skipGroup() {
	for depth := 1; depth > 0; {
		switch l.next().text {
		case "(", "[", "{":
			depth++
		case ")", "]", "}":
			depth--
		case "":
			return
		}
	}
}

func (l *lexer) skipBlanks() {
	for l.position < len(l.text) {
		rest := l.text[l.position:]
		switch {
		case strings.IndexByte(" \t\r\n\f\v", rest[0]) >= 0:
			l.position++
		case strings.HasPrefix(rest, "--"), strings.HasPrefix(rest, "#!"), strings.HasPrefix(rest, "# "):
			l.skipThrough("\n", 0)
		case strings.HasPrefix(rest, "/*"):
			l.skipThrough("*/", len("/*"))
		default:
			return
		}
	}
}

func (l *lexer) skipQuoted(quote byte) {
	for l.position++; l.position < len(l.text); l.position++ {
		switch l.text[l.position] {
		case '\\':
			l.position++
		case quote:
			// A doubled quote is read as the start of another quoted text, with the same
			// result.
			l.position++
			return
		}
	}
	l.position = len(l.text)
}

// skipHeredoc skips $tag$ … $tag$, or one byte if the text is not a heredoc.
func (l *lexer) skipHeredoc() {
	rest := l.text[l.position:]
	length := strings.IndexByte(rest[1:], '$') + 2
	if length < 2 || strings.IndexFunc(rest[1:length-1], func(r rune) bool { return r > 0x7f || !isWordByte(byte(r)) }) >= 0 { //nolint:gosec // checked
		l.position++
		return
	}
	l.skipThrough(rest[:length], length)
}

// skipThrough skips the next occurrence of text. The search begins at an
// offset.
func (l *lexer) skipThrough(text string, offset int) {
	from := l.position + offset
	if i := strings.Index(l.text[from:], text); i >= 0 {
		l.position = from + i + len(text)
	} else {
		l.position = len(l.text)
	}
}

func isWordByte(c byte) bool {
	return c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}
