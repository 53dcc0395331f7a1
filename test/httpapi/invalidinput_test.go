package httpapi_test

import (
	"context"
	"encoding/hex"
	"os"
	"regexp"
	"strconv"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// invalidInput is a row of a table in docs/input.md.
type invalidInput struct {
	what, sent, response, where, detail string
}

// readInvalidInput returns the tables of docs/input.md by heading.
func readInvalidInput() map[string][]invalidInput {
	documentation, err := os.ReadFile("../../docs/input.md")
	if err != nil {
		panic(err)
	}
	tables := make(map[string][]invalidInput)
	heading := ""
	for line := range strings.Lines(string(documentation)) {
		line = strings.TrimSpace(line)
		if title, ok := strings.CutPrefix(line, "## "); ok {
			heading = title
		}
		cells := strings.Split(strings.Trim(line, "|"), " | ")
		if heading == "" || !strings.HasPrefix(line, "|") || cells[0] == " What" || strings.HasPrefix(cells[0], " ---") {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		tables[heading] = append(tables[heading], invalidInput{
			what: cells[0], sent: spelledOut(strings.Trim(cells[1], "`")), response: cells[2], where: strings.Trim(cells[3], "`"), detail: cells[4],
		})
	}
	return tables
}

var abbreviation = regexp.MustCompile(`⟨([^⟩]*)⟩`)

// spelledOut expands ⟨text × times⟩ and ⟨bytes in hexadecimal⟩.
func spelledOut(cell string) string {
	return abbreviation.ReplaceAllStringFunc(cell, func(short string) string {
		short = abbreviation.FindStringSubmatch(short)[1]
		if text, times, ok := strings.Cut(short, " × "); ok {
			n, err := strconv.Atoi(times)
			if err != nil {
				panic(err)
			}
			return strings.Repeat(text, n)
		}
		bytes, err := hex.DecodeString(strings.ReplaceAll(short, " ", ""))
		if err != nil {
			panic(err)
		}
		return string(bytes)
	})
}

// expect expects the response of the row.
func (b invalidInput) expect(a response) {
	GinkgoHelper()
	parts := regexp.MustCompile(`^(\d{3}) \[([a-z-]+)\]\(errors\.md#([a-z-]+)\)$`).FindStringSubmatch(b.response)
	Expect(parts).NotTo(BeNil(), b.response)
	Expect(parts[2]).To(Equal(parts[3]))
	status, err := strconv.Atoi(parts[1])
	Expect(err).NotTo(HaveOccurred())
	problem := expectProblem(a, status, parts[2])
	switch place := b.where; {
	case place == "":
		Expect(problem).NotTo(HaveKey("errors"))
	case place == "the body":
		Expect(problem["errors"]).To(ConsistOf(invalidValue("pointer", "", b.detail)))
	case strings.HasPrefix(place, "/"):
		Expect(problem["errors"]).To(ConsistOf(invalidValue("pointer", place, b.detail)))
	default:
		Expect(problem["errors"]).To(ConsistOf(invalidValue("parameter", strings.Trim(place, `"`), b.detail)))
	}
}

// someID is the id in a path whose body or headers are invalid.
const someID = "019c2f07-7f3a-7cc1-b0a8-2b7a3f2f6c11"

// send sends the row's input to the operation in the heading.
func (b invalidInput) send(ctx context.Context, a *api, heading string) response {
	GinkgoHelper()
	method, path, _ := strings.Cut(heading, " ")
	switch {
	case method == "POST", method == "PATCH":
		return a.do(ctx, method, strings.Replace(path, "{id}", someID, 1), strings.NewReader(b.sent))
	case strings.Contains(path, "{id}"):
		return a.do(ctx, method, strings.Replace(path, "{id}", b.sent, 1), nil)
	case method == "GET":
		return a.get(ctx, path+"?"+b.sent)
	case heading == "Headers of a PATCH":
		return a.do(ctx, "PATCH", "/v1/users/"+someID, strings.NewReader(`{"first_name":"Ada"}`), b.sent)
	default:
		return a.create(ctx, `{"email":"ada@example.com"}`, b.sent)
	}
}

var _ = Describe("Invalid input", func() {
	for heading, rows := range readInvalidInput() {
		Describe("to "+heading, func() {
			for _, row := range rows {
				It("gets the response in docs/input.md: "+row.what, func(ctx SpecContext) {
					row.expect(row.send(ctx, start(ctx), heading))
					Expect(count(ctx, "users")).To(BeZero())
					Expect(count(ctx, "outbox_events")).To(BeZero())
				})
			}
		})
	}
})
