package db

import (
	"io/fs"
	"path"
	"strings"
)

// Render returns a file system that applies render to the text of each SQL file.
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
		return file, err //nolint:wrapcheck // fs.FS requires a *fs.PathError
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

// renderedFile is a file with replaced text.
type renderedFile struct {
	fs.File

	text *strings.Reader
}

// Read implements fs.File.
func (f renderedFile) Read(p []byte) (int, error) {
	return f.text.Read(p) //nolint:wrapcheck // io.Reader requires a plain io.EOF
}
