package deploy_test

import (
	"path"
	"regexp"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

const runbookURL = "https://github.com/diehard-outbox/diehard/blob/main/docs/runbook.md#"

var (
	heading = regexp.MustCompile(`(?m)^#+ (.+)$`)
	link    = regexp.MustCompile(`\]\(([^)#:\s]*)(?:#([^)\s]*))?\)`)
	fence   = regexp.MustCompile("(?s)```.*?```")
	notID   = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// anchors returns the anchors of a page's headings, as GitHub derives them.
func anchors(page string) (all []string) {
	for _, match := range heading.FindAllStringSubmatch(fence.ReplaceAllString(page, ""), -1) {
		all = append(all, strings.ReplaceAll(notID.ReplaceAllString(strings.ToLower(match[1]), ""), " ", "-"))
	}
	return all
}

// alertSections returns the sections of the alerts in the runbook, by their headings.
func alertSections() map[string]string {
	GinkgoHelper()
	_, rest, found := strings.Cut(readDoc("runbook.md"), "\n## Alerts\n")
	Expect(found).To(BeTrue())
	rest, _, found = strings.Cut(rest, "\n## ")
	Expect(found).To(BeTrue())
	sections := map[string]string{}
	for _, section := range strings.Split(rest, "\n### ")[1:] {
		name, text, _ := strings.Cut(section, "\n")
		sections[name] = text
	}
	return sections
}

var _ = Describe("The runbook", func() {
	It("has a section for each alert, and no other section of alerts", func() {
		sections := alertSections()
		for _, rule := range readRules() {
			if rule.Alert == "" {
				continue
			}
			Expect(sections).To(HaveKey(rule.Alert))
			delete(sections, rule.Alert)
			Expect(rule.Labels["severity"]).To(BeElementOf("page", "ticket"), rule.Alert)
			Expect(rule.Annotations).To(And(HaveLen(3), HaveKeyWithValue("runbook_url", runbookURL+strings.ToLower(rule.Alert)),
				HaveKey("summary"), HaveKey("description")), rule.Alert)
		}
		Expect(sections).To(BeEmpty())
	})

	It("says for each alert what to run, what it means, and what to do", func() {
		for name, section := range alertSections() {
			Expect(section).To(MatchRegexp("(?s)^\n```sh\n.+?\n```\n.*\n\\*\\*Meaning\\.\\*\\* .*\n\\*\\*Look at\\.\\*\\* .*\n\\*\\*Do\\.\\*\\* .*\n\\*\\*Never\\.\\*\\* "), name)
		}
	})

	It("begins each section of an alert with commands that change nothing", func() {
		for name, section := range alertSections() {
			_, commands, _ := strings.Cut(section, "```sh\n")
			commands, _, _ = strings.Cut(commands, "\n```")
			for command := range strings.Lines(commands) {
				Expect(command).To(MatchRegexp(`^(relay (status|check|config|batches (list|show)|dead-letters (list|show))\b|curl -s |kubectl (get|logs) |df |psql .* -c 'SELECT )`), name)
			}
		}
	})

	DescribeTable("and the page about Kubernetes have links that lead somewhere",
		func(name string) {
			page := readDoc(name)
			links := link.FindAllStringSubmatch(page, -1)
			Expect(links).NotTo(BeEmpty())
			for _, match := range links {
				if match[1] != "" {
					Expect(path.Join("../../docs", match[1])).To(BeAnExistingFile())
				}
				if match[2] != "" {
					target := page
					if match[1] != "" {
						target = readDoc(match[1])
					}
					Expect(anchors(target)).To(ContainElement(match[2]), match[0])
				}
			}
		},
		Entry("runbook.md", "runbook.md"),
		Entry("kubernetes.md", "kubernetes.md"),
	)
})
