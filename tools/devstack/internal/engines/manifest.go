package engines

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

const manifestName = "manifest.json"

// fileRecord describes a file at its installation.
type fileRecord struct {
	Size     int64     `json:"size"`
	Modified time.Time `json:"modified"`
	SHA256   string    `json:"sha256"`
}

// writeManifest records every file under dir.
func writeManifest(dir string) error {
	files := map[string]fileRecord{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err //nolint:wrapcheck // the error names the file
		}
		sum, err := hashFile(filepath.Join(dir, path))
		if err != nil {
			return err
		}
		files[path] = fileRecord{Size: info.Size(), Modified: info.ModTime(), SHA256: sum}
		return nil
	})
	if err != nil {
		return err //nolint:wrapcheck // an error of the function
	}
	encoded, err := json.Marshal(files)
	if err != nil {
		return err //nolint:wrapcheck // cannot fail with these types
	}
	return os.WriteFile(filepath.Join(dir, manifestName), encoded, 0o644) //nolint:gosec,wrapcheck // not a secret; the error names the file
}

// checkManifest compares the files with the manifest. It compares size and time, which
// takes milliseconds. It compares the content too if the time differs or if all is set.
func checkManifest(dir string, all bool) error {
	encoded, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err != nil {
		return err //nolint:wrapcheck // the error names the file
	}
	var files map[string]fileRecord
	if err := json.Unmarshal(encoded, &files); err != nil {
		return fmt.Errorf("%s: %w", manifestName, err)
	}
	for path, want := range files {
		full := filepath.Join(dir, path)
		info, err := os.Lstat(full)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("%s is missing", path)
		case err != nil:
			return err //nolint:wrapcheck // the error names the file
		case info.Size() != want.Size:
			return fmt.Errorf("%s has %d bytes instead of %d", path, info.Size(), want.Size)
		case info.ModTime().Equal(want.Modified) && !all:
			continue
		}
		sum, err := hashFile(full)
		if err != nil {
			return err
		}
		if sum != want.SHA256 {
			return fmt.Errorf("%s has changed", path)
		}
	}
	return nil
}

func hashFile(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err //nolint:wrapcheck // the error names the file
	}
	defer func() { _ = file.Close() }()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return "", err //nolint:wrapcheck // the error names the file
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}
