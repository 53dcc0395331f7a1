package db

import (
	"io/fs"
	"path"
	"strings"
)

// Render returns the file system with each SQL file's text as render returns it.
func Render(files fs.FS, render func(text string) (string, error)) fs.FS {
	return rendered{files, render}
}

type rendered struct {
	fs.FS

	render func(text string) (string, error)
}

// Open implements fs.FS.
func (r rendered) Open(name string) (fs.File, error) {
	file, err := r.FS.Open(name)
	if err != nil || path.Ext(name) != ".sql" {
		return file, err //nolint:wrapcheck // a *fs.PathError, as fs.FS asks for
	}
	source, err := fs.ReadFile(r.FS, name)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	text, err := r.render(string(source))
	if err != nil {
		return nil, &fs.PathError{Op: "render", Path: name, Err: err}
	}
	return renderedFile{file, strings.NewReader(text)}, nil
}

// renderedFile is a file with another text.
type renderedFile struct {
	fs.File

	text *strings.Reader
}

// Read implements fs.File.
func (f renderedFile) Read(p []byte) (int, error) {
	return f.text.Read(p) //nolint:wrapcheck // io.EOF
}
