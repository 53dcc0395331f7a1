package helm_test

import (
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"go.yaml.in/yaml/v3"
)

var _ = Describe("A mistake in the values", func() {
	DescribeTable("is an error that names the value",
		func(ctx SpecContext, changes, message string) {
			_, err := tryRender(ctx, changes)
			Expect(err).To(MatchError(ContainSubstring(message)))
		},
		Entry("an unknown value", "relay: {replica: 3}", "at '/relay': additional properties 'replica' not allowed"),
		Entry("a wrong type", "relay: {shutdownTimeoutSeconds: 35s}", "at '/relay/shutdownTimeoutSeconds': got string, want integer"),
		Entry("a number outside of its bounds", "podDisruptionBudget: {maxUnavailable: 0}", "at '/podDisruptionBudget/maxUnavailable': minimum: got 0, want 1"),
		Entry("an unknown configuration key", "relay: {config: {relay: {worker: 4}}}", "at '/relay/config/relay': additional properties 'worker' not allowed"),
		Entry("a key of the other program", "api: {config: {relay: {workers: 4}}}", "at '/api/config': additional properties 'relay' not allowed"),
		Entry("a key of one program for both", "config: {http: {docs: off}}", "at '/config': additional properties 'http' not allowed"),
		Entry("a configuration value that is a list", "api: {config: {http: {trusted_proxies: [10.0.0.0/8]}}}", "at '/api/config/http/trusted_proxies': got array, want boolean or number or string"),
		Entry("a secret in the name of a Secret", "relay: {secrets: {postgresDSN: {name: 'postgres://relay:secret@postgres/diehard'}}}", "at '/relay/secrets/postgresDSN/name': "),
		Entry("a secret instead of the name of a Secret", "relay: {secrets: {postgresDSN: 'postgres://postgres/diehard'}}", "at '/relay/secrets/postgresDSN': got string, want object"),
		Entry("a variable of Diehard among the others", "extraEnv: [{name: DIEHARD_POSTGRES_DSN, value: x}]", "extraEnv contains DIEHARD_POSTGRES_DSN: use config or the name of a Secret instead"),
		Entry("a label of the chart", "api: {podLabels: {app.kubernetes.io/name: api}}", "api.podLabels contains app.kubernetes.io/name, which the chart sets"),
		Entry("a port that is a name", "networkPolicy: {postgresql: {ports: [postgresql]}}", "at '/networkPolicy/postgresql/ports/0': got string, want integer"),
		Entry("a collector without a scheme", "otlp: {endpoint: 'collector:4317'}", "at '/otlp/endpoint': 'collector:4317' does not match pattern"),

		Entry("no environment", "environment: ''", "environment is empty, and has no default"),
		Entry("no tag", "image: {tag: ''}", "image.tag is empty, and has no default"),
		Entry("no image of the API", "api: {image: {repository: ''}}", "api.image.repository is empty, and has no default"),
		Entry("no Secret of the relay", "relay: {secrets: {clickhouseDSN: {name: ''}}}", "relay.secrets.clickhouseDSN.name is empty: create a Secret with the key clickhouse-dsn, and set its name"),
		Entry("no Secret of the API", "api: {secrets: {postgresDSN: {name: ''}}}", "api.secrets.postgresDSN.name is empty: create a Secret with the key postgres-dsn, and set its name"),
		Entry("no API keys", "api: {secrets: {apiKeys: {name: ''}}}", "api.secrets.apiKeys.name is empty: create a Secret with the key api-keys, and set its name"),
		Entry("no Secret of the migrations", "migrations: {secrets: {postgresDSN: {name: ''}}}", "migrations.secrets.postgresDSN.name is empty: create a Secret"),
		Entry("replicas with autoscaling of the API", "api: {replicas: 3, autoscaling: {enabled: true}}",
			"api.replicas and api.autoscaling.enabled are both set: the autoscaler sets the number of pods, so remove api.replicas"),
		Entry("replicas with autoscaling of the relay", "relay: {replicas: 2, autoscaling: {enabled: true, prometheus: {serverAddress: 'http://prometheus', selector: 'job=\"relay\"'}}}",
			"relay.replicas and relay.autoscaling.enabled are both set: the autoscaler sets the number of pods, so remove relay.replicas"),
		Entry("a minimum above the maximum", "api: {autoscaling: {enabled: true, minReplicas: 9}}", "api.autoscaling.minReplicas is 9, must be at most maxReplicas (6)"),
		Entry("no request of CPU for the autoscaler", "api: {autoscaling: {enabled: true}, resources: {requests: {cpu: null}}}", "api.resources.requests.cpu is missing: api.autoscaling needs it"),
		Entry("no Prometheus for KEDA", "serviceMonitor: {enabled: true}\nrelay: {autoscaling: {enabled: true}}", "relay.autoscaling.prometheus.serverAddress is empty: set it to the URL of Prometheus"),
		Entry("metrics that KEDA cannot find", "relay: {autoscaling: {enabled: true, prometheus: {serverAddress: 'http://prometheus'}}}", "relay.autoscaling.prometheus.selector is empty: set it to the label matchers"),
		Entry("a Prometheus that may not connect", "networkPolicy: {enabled: true}\nserviceMonitor: {enabled: true}", "networkPolicy.adminFrom is empty: no Prometheus could scrape the metrics"),
		Entry("a DSN", "relay: {config: {postgres: {dsn: 'postgres://relay:secret@postgres/diehard'}}}", "relay.config.postgres.dsn must not be set: set the name of a Secret in secrets.postgresDSN"),
		Entry("API keys", "api: {config: {api: {keys: 0a}}}", "api.config.api.keys must not be set: set the name of a Secret in api.secrets.apiKeys"),
		Entry("a token", "relay: {config: {admin: {token: secret}}}", "relay.config.admin.token must not be set: set the name of a Secret in relay.secrets.adminToken"),
		Entry("the time of a stop as a key", "relay: {config: {relay: {shutdown_timeout: 2m}}}", "relay.config.relay.shutdown_timeout must not be set: set relay.shutdownTimeoutSeconds"),
	)

	It("is reported with all other mistakes", func(ctx SpecContext) {
		_, err := renderExactly(ctx, map[string]any{})
		Expect(err).To(HaveOccurred())
		_, list, found := strings.Cut(err.Error(), "invalid values:\n")
		Expect(found).To(BeTrue(), err.Error())
		Expect(strings.Count(list, " is empty")).To(Equal(10), list)
	})

	It("is not reported with its secret", func(ctx SpecContext) {
		_, err := tryRender(ctx, "relay: {config: {postgres: {dsn: 'postgres://relay:hunter2@postgres/diehard'}}}")
		Expect(err).To(MatchError(Not(ContainSubstring("hunter2"))))
	})
})

// schema is the part of a JSON schema that the specs read.
type schema struct {
	Properties map[string]schema `json:"properties"`
}

// paths returns the paths of all properties.
func (s schema) paths(prefix string) (all []string) {
	for name, property := range s.Properties {
		all = append(append(all, prefix+name), property.paths(prefix+name+".")...)
	}
	return all
}

func readSchema() (s schema) {
	GinkgoHelper()
	Expect(json.Unmarshal([]byte(readFile("deploy/helm/diehard/values.schema.json")), &s)).To(Succeed())
	return s
}

var _ = Describe("The values", func() {
	It("have a comment each", func() {
		var document yaml.Node
		Expect(yaml.Unmarshal([]byte(readFile("deploy/helm/diehard/values.yaml")), &document)).To(Succeed())
		var visit func(node *yaml.Node, prefix string)
		visit = func(node *yaml.Node, prefix string) {
			for i := 0; i < len(node.Content); i += 2 {
				name, value := node.Content[i], node.Content[i+1]
				isGroup := value.Kind == yaml.MappingNode && value.Style&yaml.FlowStyle == 0
				if name.HeadComment == "" {
					Expect(isGroup).To(BeTrue(), "%s%s has no comment", prefix, name.Value)
				} else {
					Expect(name.HeadComment).To(HaveSuffix("."), prefix+name.Value)
				}
				if isGroup && name.Value != "resources" { // its comment explains its values
					visit(value, prefix+name.Value+".")
				}
			}
		}
		visit(document.Content[0], "")
	})

	It("are the properties of the schema", func() {
		var values map[string]any
		Expect(yaml.Unmarshal([]byte(readFile("deploy/helm/diehard/values.yaml")), &values)).To(Succeed())
		for _, path := range readSchema().paths("") {
			if path == "global" || strings.Contains("."+path, ".config.") {
				continue // global is for charts that contain this chart
			}
			value := any(values)
			for name := range strings.SplitSeq(path, ".") {
				mapping, ok := value.(map[string]any)
				Expect(ok).To(BeTrue(), path)
				Expect(mapping).To(HaveKey(name), path)
				value = mapping[name]
			}
		}
	})

	DescribeTable("accept the configuration keys of the program",
		func(part func(schema) schema, programs ...string) {
			var expected []string
			for _, name := range slices.Sorted(maps.Keys(both(programs))) {
				if name != "DIEHARD_ENVIRONMENT" {
					expected = append(expected, name)
				}
			}
			var accepted []string
			for section, keys := range part(readSchema()).Properties {
				for key := range keys.Properties {
					accepted = append(accepted, "DIEHARD_"+strings.ToUpper(section+"_"+key))
				}
			}
			Expect(accepted).To(ConsistOf(expected))
		},
		Entry("api", func(s schema) schema { return s.Properties["api"].Properties["config"] }, "api"),
		Entry("relay", func(s schema) schema { return s.Properties["relay"].Properties["config"] }, "relay"),
		Entry("both", func(s schema) schema { return s.Properties["config"] }, "api", "relay"),
	)
})

// both returns the variables that all of the programs have.
func both(programs []string) map[string]bool {
	all := map[string]bool{}
	for _, name := range variables(programs[0]) {
		if !slices.ContainsFunc(programs, func(program string) bool { return !slices.Contains(variables(program), name) }) {
			all[name] = true
		}
	}
	return all
}

// valuePath matches a value in docs/kubernetes.md.
var valuePath = regexp.MustCompile("`((?:api|relay|migrations|check|image|config|otlp|networkPolicy|podDisruptionBudget|securityContext|serviceMonitor|prometheusRule)\\.[A-Za-z.]+)`")

var _ = Describe("docs/kubernetes.md", func() {
	It("names values that exist", func() {
		known := readSchema().paths("")
		found := valuePath.FindAllStringSubmatch(readFile("docs/kubernetes.md"), -1)
		Expect(found).NotTo(BeEmpty())
		for _, match := range found {
			path := match[1]
			Expect(known).To(Or(ContainElement(path), ContainElement("api.config."+path), ContainElement("relay.config."+path)))
		}
	})

	It("has an example that the chart accepts", func(ctx SpecContext) {
		_, rest, found := strings.Cut(readFile("docs/kubernetes.md"), "```yaml\n   # values.yaml\n")
		Expect(found).To(BeTrue())
		example, _, _ := strings.Cut(rest, "   ```\n")
		all, err := renderExactly(ctx, parse(example))
		Expect(err).NotTo(HaveOccurred())
		for _, o := range all {
			Expect(check(o)).To(BeEmpty())
		}
	})
})
