package helm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"sigs.k8s.io/yaml"
)

const (
	release   = "shop"
	namespace = "outbox"
)

// object is a rendered object, with the fields that the specs read. Its kinds have the same
// names for different things, so a field is set for some kinds only.
type object struct {
	APIVersion, Kind string
	Metadata         metadata
	Spec             spec

	// whole is the object with all its fields.
	whole map[string]any
}

type metadata struct {
	Name, Namespace     string
	Labels, Annotations map[string]string
}

type spec struct {
	Replicas *int
	Template struct {
		Metadata metadata
		Spec     pod
	}
	Selector, PodSelector map[string]any
	ScaleTargetRef        struct{ Kind, Name string }
	Ports                 []servicePort

	// Of a PodDisruptionBudget.
	MaxUnavailable             int
	UnhealthyPodEvictionPolicy string

	// Of a NetworkPolicy.
	PolicyTypes     []string
	Ingress, Egress []rule

	// Of a Service.
	ClusterIP, Type          string
	PublishNotReadyAddresses bool

	// Of a ServiceMonitor, a PrometheusRule and a ScaledObject.
	Endpoints []struct {
		Port, Path  string
		Relabelings []struct{ TargetLabel, Replacement string }
	}
	Groups   []any
	Triggers []struct {
		Name     string
		Metadata map[string]string
	}

	// Of a Job.
	BackoffLimit, ActiveDeadlineSeconds int
}

type servicePort struct {
	Name       string
	Port       int
	TargetPort string
}

type rule struct {
	Ports []struct {
		Protocol string
		Port     any
	}
	From, To []any
}

type pod struct {
	AutomountServiceAccountToken, EnableServiceLinks *bool
	ServiceAccountName                               string
	ImagePullSecrets                                 []struct{ Name string }
	TerminationGracePeriodSeconds                    int
	SecurityContext                                  struct {
		RunAsNonRoot        bool
		RunAsUser           *int
		RunAsGroup, FSGroup *int
		SeccompProfile      struct{ Type string }
	}
	TopologySpreadConstraints []struct {
		TopologyKey   string
		LabelSelector map[string]any
	}
	InitContainers, Containers []container
	RestartPolicy              string
}

func (p pod) all() []container { return slices.Concat(p.InitContainers, p.Containers) }

type container struct {
	Name, Image string
	Args        []string
	Env         []variable
	Ports       []struct {
		Name          string
		ContainerPort int
	}
	LivenessProbe, ReadinessProbe *probe
	Lifecycle                     struct {
		PreStop *struct{ Sleep struct{ Seconds int } }
	}
	Resources       struct{ Limits, Requests map[string]string }
	SecurityContext struct {
		AllowPrivilegeEscalation *bool
		ReadOnlyRootFilesystem   bool
		Capabilities             struct{ Drop, Add []string }
	}
}

// port returns the number of a port, or 0.
func (c container) port(name string) int {
	for _, port := range c.Ports {
		if port.Name == name {
			return port.ContainerPort
		}
	}
	return 0
}

type probe struct {
	HTTPGet                         struct{ Path, Port string }
	PeriodSeconds, TimeoutSeconds   int
	FailureThreshold, InitialDelays int
}

type variable struct {
	Name, Value string
	ValueFrom   *struct {
		SecretKeyRef *struct{ Name, Key string }
	}
}

type objects []*object

func (all objects) of(kind string) (found objects) {
	for _, o := range all {
		if o.Kind == kind {
			found = append(found, o)
		}
	}
	return found
}

// named returns the only object of the kind whose name ends in the suffix.
func (all objects) named(kind, suffix string) *object {
	GinkgoHelper()
	var found objects
	for _, o := range all.of(kind) {
		if strings.HasSuffix(o.Metadata.Name, suffix) {
			found = append(found, o)
		}
	}
	Expect(found).To(HaveLen(1), "%s %s", kind, suffix)
	return found[0]
}

// workloads returns the objects that create pods.
func (all objects) workloads() objects { return slices.Concat(all.of("Deployment"), all.of("Job")) }

const componentLabel = "app.kubernetes.io/component"

func (o *object) component() string { return o.Spec.Template.Metadata.Labels[componentLabel] }

// required are the values without a default.
const required = `
environment: Production
image: {tag: v0.1.0}
api:
  image: {repository: registry.example.com/diehard-api}
  secrets: {postgresDSN: {name: api}, apiKeys: {name: api}}
relay:
  image: {repository: registry.example.com/diehard-relay}
  secrets: {postgresDSN: {name: relay}, clickhouseDSN: {name: relay}}
migrations:
  secrets: {postgresDSN: {name: migrations}, clickhouseDSN: {name: migrations}}
`

// render renders the chart with the required values, changed by others. Specs must not
// change the result, because other specs use it too.
func render(ctx context.Context, changes string) objects {
	GinkgoHelper()
	if rendered[changes] == nil {
		all, err := tryRender(ctx, changes)
		Expect(err).NotTo(HaveOccurred())
		rendered[changes] = all
	}
	return rendered[changes]
}

var rendered = map[string]objects{}

// tryRender is render, but returns the error of Helm.
func tryRender(ctx context.Context, changes string) (objects, error) {
	GinkgoHelper()
	values := parse(required)
	merge(values, parse(changes))
	return renderExactly(ctx, values)
}

func renderExactly(ctx context.Context, values map[string]any) (all objects, err error) {
	GinkgoHelper()
	input, err := yaml.Marshal(values)
	Expect(err).NotTo(HaveOccurred())
	command := exec.CommandContext(ctx, renderer, chart, release, namespace)
	var output, problems bytes.Buffer
	command.Stdin, command.Stdout, command.Stderr = bytes.NewReader(input), &output, &problems
	if err := command.Run(); err != nil {
		return nil, errors.New(problems.String())
	}
	var templates map[string]string
	Expect(json.Unmarshal(output.Bytes(), &templates)).To(Succeed())
	for _, name := range slices.Sorted(maps.Keys(templates)) {
		if !strings.HasSuffix(name, ".yaml") {
			continue
		}
		for text := range strings.SplitSeq("\n"+templates[name], "\n---\n") {
			o := &object{whole: map[string]any{}}
			// UnmarshalStrict refuses duplicate keys.
			Expect(yaml.UnmarshalStrict([]byte(text), &o.whole)).To(Succeed(), name)
			if len(o.whole) == 0 {
				continue
			}
			Expect(yaml.Unmarshal([]byte(text), o)).To(Succeed(), name)
			all = append(all, o)
		}
	}
	return all, nil
}

func parse(text string) (values map[string]any) {
	GinkgoHelper()
	Expect(yaml.UnmarshalStrict([]byte(text), &values)).To(Succeed())
	if values == nil {
		values = map[string]any{}
	}
	return values
}

// merge changes values as a further values file does.
func merge(values, changes map[string]any) {
	for name, change := range changes {
		before, isMap := values[name].(map[string]any)
		if after, ok := change.(map[string]any); ok && isMap {
			merge(before, after)
			continue
		}
		values[name] = change
	}
}

// matches returns whether a selector selects an object with the labels.
func matches(selector map[string]any, labels map[string]string) bool {
	wanted, ok := selector["matchLabels"].(map[string]any)
	if !ok {
		wanted = selector
	}
	for name, value := range wanted {
		if labels[name] != fmt.Sprint(value) {
			return false
		}
	}
	return len(wanted) > 0
}

// selected returns the components whose pods a selector selects.
func (all objects) selected(selector map[string]any) (components []string) {
	for _, workload := range all.workloads() {
		if matches(selector, workload.Spec.Template.Metadata.Labels) {
			components = append(components, workload.component())
		}
	}
	return components
}
