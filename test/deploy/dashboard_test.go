package deploy_test

import (
	"encoding/json"
	"os"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

// dashboard is the part of a Grafana dashboard that the specs check.
type dashboard struct {
	SchemaVersion int     `json:"schemaVersion"` //nolint:tagliatelle // Grafana's name
	Panels        []panel `json:"panels"`
	Templating    struct {
		List []struct {
			Name  string `json:"name"`
			Type  string `json:"type"`
			Query any    `json:"query"`
		} `json:"list"`
	} `json:"templating"`
}

type panel struct {
	ID          int      `json:"id"`
	Type        string   `json:"type"`
	Title       string   `json:"title"`
	Description string   `json:"description"`
	GridPos     gridPos  `json:"gridPos"` //nolint:tagliatelle // Grafana's name
	Targets     []target `json:"targets"`
	FieldConfig struct {
		Defaults struct {
			Unit string `json:"unit"`
		} `json:"defaults"`
	} `json:"fieldConfig"` //nolint:tagliatelle // Grafana's name
}

type gridPos struct {
	H int `json:"h"`
	W int `json:"w"`
	X int `json:"x"`
	Y int `json:"y"`
}

type target struct {
	Expr       string `json:"expr"`
	Datasource struct {
		UID string `json:"uid"`
	} `json:"datasource"`
}

func (p gridPos) overlaps(other gridPos) bool {
	return p.X < other.X+other.W && other.X < p.X+p.W && p.Y < other.Y+other.H && other.Y < p.Y+p.H
}

func readDashboard() (d dashboard) {
	GinkgoHelper()
	content, err := os.ReadFile("../../deploy/grafana/diehard.json")
	Expect(err).NotTo(HaveOccurred())
	Expect(json.Unmarshal(content, &d)).To(Succeed())
	return d
}

// variables replaces the variables of the dashboard's expressions, as Grafana does.
var variables = strings.NewReplacer("$__rate_interval", "5m", "$api_job", "api", "$job", "relay", "$instance", "a")

// expressions returns the PromQL expressions of the dashboard.
func (d dashboard) expressions() (all []string) {
	for _, panel := range d.Panels {
		for _, target := range panel.Targets {
			all = append(all, variables.Replace(target.Expr))
		}
	}
	return all
}

var _ = Describe("The dashboard", func() {
	It("has panels with unique ids, units and descriptions, which do not overlap", func() {
		d := readDashboard()
		Expect(d.SchemaVersion).To(BeNumerically(">=", 39), "Grafana 10 or newer")
		ids := map[int]bool{}
		for i, panel := range d.Panels {
			Expect(ids).NotTo(HaveKey(panel.ID), panel.Title)
			ids[panel.ID] = true
			Expect(panel.Title).NotTo(BeEmpty())
			for _, other := range d.Panels[:i] {
				Expect(panel.GridPos.overlaps(other.GridPos)).To(BeFalse(), "%s, %s", panel.Title, other.Title)
			}
			if panel.Type == "row" {
				continue
			}
			Expect(panel.Description).To(HaveSuffix("."), panel.Title)
			Expect(panel.FieldConfig.Defaults.Unit).NotTo(BeEmpty(), panel.Title)
			Expect(panel.Targets).NotTo(BeEmpty(), panel.Title)
			Expect(panel.Targets).To(HaveEach(HaveField("Datasource.UID", "${datasource}")), panel.Title)
		}
	})

	It("selects the data source, the fleet and the instance by variables", func() {
		var names []string
		for _, variable := range readDashboard().Templating.List {
			names = append(names, variable.Name+": "+variable.Type)
		}
		Expect(names).To(ConsistOf("datasource: datasource", "job: query", "api_job: query", "instance: query"))
	})

	It("has expressions that a server evaluates", func(ctx SpecContext) {
		healthy := evaluating(healthy())
		for _, expression := range readDashboard().expressions() {
			healthy.query(ctx, expression, now)
		}
	})

	DescribeTable("shows the verdict", func(ctx SpecContext, verdict float64, changes ...change) {
		server := evaluating(after(healthy(), changes...))
		Expect(server.query(ctx, readDashboard().expressions()[0], now)).To(ConsistOf(HaveField("F", verdict)))
	},
		Entry("delivering", 0.0),
		Entry("a relay is impaired", 0.0, set(`diehard_relay_circuit_open{instance="a"}`, gauge(1))),
		Entry("ClickHouse fails", 1.0, set("diehard_relay_circuit_open", gauge(1))),
		Entry("stalled", 1.0, set("diehard_relay_stalled", gauge(1))),
		Entry("PostgreSQL fails", 2.0, set("diehard_relay_postgresql_failing", gauge(1)), set("diehard_relay_stalled", gauge(1))),
		Entry("paused", 3.0, set("diehard_relay_paused", gauge(1)), set("diehard_relay_circuit_open", gauge(1))),
	)
})
