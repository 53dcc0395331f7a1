package engines

import (
	"fmt"
	"io"
)

type progressReport struct{}

func startProgress(w io.Writer, _ string, _ platform) *progressReport {
	if w != nil {
		_, _ = fmt.Fprintln(w, "fetching the database engines (PostgreSQL and ClickHouse), once")
	}
	return &progressReport{}
}

func (*progressReport) finish(bool) {}
