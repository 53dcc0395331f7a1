package helm_test

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/spf13/pflag"

	"github.com/diehard-outbox/diehard/pkg/config"
)

// stopping is the time that a program needs to stop after its own limits: 2 seconds for the
// operators' port, and 3 seconds each for traces and for reports to Sentry.
const stopping = 8 * time.Second

// checkTimeout is the limit of a check of /readyz, in pkg/admin.
const checkTimeout = 2

var _ = Describe("The chart", func() {
	for _, name := range slices.Sorted(maps.Keys(matrix)) {
		Context("with "+name, func() {
			var all objects

			BeforeEach(func(ctx SpecContext) { all = render(ctx, matrix[name]) })

			It("renders objects that the schemas accept", func() {
				Expect(all).NotTo(BeEmpty())
				for _, o := range all {
					Expect(check(o)).To(BeEmpty())
					Expect(o.Metadata.Namespace).To(Equal(namespace))
				}
			})

			It("gives each object of a kind a name of its own", func() {
				names := map[string]bool{}
				for _, o := range all {
					id := o.Kind + " " + o.Metadata.Name
					Expect(names).NotTo(HaveKey(id))
					names[id] = true
				}
			})

			It("selects the pods of one component", func() {
				components := []string{"relay"}
				if name != "no API" {
					components = append(components, "api")
				}
				for _, o := range all {
					component := o.Metadata.Labels[componentLabel]
					switch o.Kind {
					case "Deployment", "Service", "PodDisruptionBudget":
						Expect(all.selected(o.Spec.Selector)).To(Equal([]string{component}), o.Metadata.Name)
						Expect(components).To(ContainElement(component))
					case "NetworkPolicy":
						Expect(all.selected(o.Spec.PodSelector)).To(Equal([]string{component}), o.Metadata.Name)
					case "ServiceMonitor":
						var services []string
						for _, service := range all.of("Service") {
							if matches(o.Spec.Selector, service.Metadata.Labels) {
								services = append(services, service.Metadata.Name)
								Expect(service.Spec.Ports[0].Name).To(Equal(o.Spec.Endpoints[0].Port))
							}
						}
						Expect(services).To(Equal([]string{o.Metadata.Name + "-admin"}))
					case "HorizontalPodAutoscaler", "ScaledObject":
						target := all.named("Deployment", o.Spec.ScaleTargetRef.Name)
						Expect(target.component()).To(Equal(component))
						Expect(target.Spec.Replicas).To(BeNil())
					}
					for _, constraint := range o.Spec.Template.Spec.TopologySpreadConstraints {
						Expect(all.selected(constraint.LabelSelector)).To(Equal([]string{o.component()}))
					}
				}
				Expect(all.of("Deployment")).To(HaveLen(len(components)))
			})

			It("has ports that agree", func() {
				for _, o := range all.of("Deployment") {
					c := o.Spec.Template.Spec.Containers[0]
					expected := map[string]int{"admin": port(loaded(o.component(), c).admin)}
					if o.component() == "api" {
						expected["http"] = port(loaded("api", c).http)
					}
					ports := map[string]int{}
					var exposed []string
					for _, p := range c.Ports {
						ports[p.Name] = p.ContainerPort
						exposed = append(exposed, strconv.Itoa(p.ContainerPort))
					}
					Expect(ports).To(Equal(expected))
					Expect(imageOf(o.component())).To(ContainSubstring("\nEXPOSE "+strings.Join(exposed, " ")+"\n"), "the image's ports")
					Expect(c.LivenessProbe.HTTPGet.Port).To(Equal("admin"))
					Expect(c.ReadinessProbe.HTTPGet.Port).To(Equal("admin"))
				}
				for _, o := range slices.Concat(all.of("Service"), all.of("NetworkPolicy")) {
					for _, selectable := range all.of("Deployment") {
						if selectable.component() != o.Metadata.Labels[componentLabel] {
							continue
						}
						c := selectable.Spec.Template.Spec.Containers[0]
						for _, p := range o.Spec.Ports {
							Expect(c.port(p.TargetPort)).NotTo(BeZero(), p.TargetPort)
							if o.Spec.ClusterIP == "None" {
								Expect(p.Port).To(Equal(c.port(p.TargetPort)), "a headless Service translates no ports")
							}
						}
						for _, rule := range o.Spec.Ingress {
							for _, p := range rule.Ports {
								Expect(c.port(fmt.Sprint(p.Port))).NotTo(BeZero(), "%v", p.Port)
							}
						}
					}
				}
			})

			It("sets variables that the programs know, and values that they accept", func() {
				for _, o := range all.workloads() {
					for _, c := range o.Spec.Template.Spec.all() {
						known, names := variables(program(c)), map[string]bool{}
						for _, v := range c.Env {
							Expect(names).NotTo(HaveKey(v.Name), "a variable that is set twice")
							names[v.Name] = true
							if strings.HasPrefix(v.Name, "DIEHARD_") {
								Expect(known).To(ContainElement(v.Name), c.Name)
							}
						}
						Expect(loaded(program(c), c).environment).To(Equal("Production"))
					}
				}
			})

			It("gives the programs the time to stop that they need", func() {
				for _, o := range all.of("Deployment") {
					pod := o.Spec.Template.Spec
					c := pod.Containers[0]
					needed := loaded(o.component(), c).stop + stopping
					if hook := c.Lifecycle.PreStop; hook != nil {
						needed += time.Duration(hook.Sleep.Seconds) * time.Second
					}
					Expect(time.Duration(pod.TerminationGracePeriodSeconds)*time.Second).To(BeNumerically(">", needed), o.component())
				}
			})

			It("probes the programs, and waits longer than a check of them", func() {
				for _, o := range all.of("Deployment") {
					c := o.Spec.Template.Spec.Containers[0]
					Expect(c.LivenessProbe.HTTPGet.Path).To(Equal("/livez"))
					Expect(c.ReadinessProbe.HTTPGet.Path).To(Equal("/readyz"))
					Expect(c.LivenessProbe.TimeoutSeconds).To(BeNumerically(">", checkTimeout))
					Expect(c.ReadinessProbe.TimeoutSeconds).To(BeNumerically(">", checkTimeout))
					Expect(c.ReadinessProbe.PeriodSeconds).To(BeNumerically(">=", c.ReadinessProbe.TimeoutSeconds))
				}
			})

			It("gives no process more rights than it needs", func() {
				for _, o := range all.workloads() {
					pod := o.Spec.Template.Spec
					Expect(pod.AutomountServiceAccountToken).To(HaveValue(BeFalse()))
					Expect(pod.EnableServiceLinks).To(HaveValue(BeFalse()))
					Expect(pod.SecurityContext.RunAsNonRoot).To(BeTrue())
					Expect(pod.SecurityContext.SeccompProfile.Type).To(Equal("RuntimeDefault"))
					if name == "users that the cluster chooses" {
						Expect(pod.SecurityContext.RunAsUser).To(BeNil())
					} else {
						Expect(readFile("Dockerfile")).To(ContainSubstring(fmt.Sprintf("\nUSER %d:%d\n", *pod.SecurityContext.RunAsUser, *pod.SecurityContext.RunAsGroup)))
					}
					Expect(pod.all()).NotTo(BeEmpty())
					for _, c := range pod.all() {
						Expect(c.SecurityContext.AllowPrivilegeEscalation).To(HaveValue(BeFalse()))
						Expect(c.SecurityContext.ReadOnlyRootFilesystem).To(BeTrue())
						Expect(c.SecurityContext.Capabilities.Drop).To(Equal([]string{"ALL"}))
						Expect(c.SecurityContext.Capabilities.Add).To(BeEmpty())
					}
				}
			})

			It("never blocks a drain", func() {
				for _, o := range all.of("PodDisruptionBudget") {
					Expect(o.Spec.MaxUnavailable).To(BeNumerically(">=", 1))
					Expect(o.Spec.UnhealthyPodEvictionPolicy).To(Equal("AlwaysAllow"))
				}
			})

			It("contains no secret", func() {
				Expect(all.of("Secret")).To(BeEmpty())
				Expect(all.of("ConfigMap")).To(BeEmpty())
				for _, o := range all.workloads() {
					for _, c := range o.Spec.Template.Spec.all() {
						for _, v := range c.Env {
							if secretVariable.MatchString(v.Name) {
								Expect(v.Value).To(BeEmpty(), v.Name)
								Expect(v.ValueFrom.SecretKeyRef).NotTo(BeNil(), v.Name)
							}
						}
					}
				}
			})

			It("runs the migrations and then the check before it changes anything else", func() {
				weights := map[string]int{}
				for _, o := range all {
					hook := o.Metadata.Annotations["helm.sh/hook"]
					if o.Kind != "Job" && o.component() == "" && hook == "" {
						continue
					}
					if o.Kind == "Deployment" {
						Expect(hook).To(BeEmpty())
						continue
					}
					Expect(hook).To(Equal("pre-install,pre-upgrade"), o.Metadata.Name)
					Expect(o.Metadata.Annotations["helm.sh/hook-delete-policy"]).To(Equal("before-hook-creation,hook-succeeded"))
					weight, err := strconv.Atoi(o.Metadata.Annotations["helm.sh/hook-weight"])
					Expect(err).NotTo(HaveOccurred())
					weights[o.Kind+" "+o.Metadata.Labels[componentLabel]] = weight
					if o.Kind == "Job" {
						Expect(o.Spec.ActiveDeadlineSeconds).To(BeNumerically("<", 300), "Helm's --timeout")
						Expect(o.Spec.Template.Spec.RestartPolicy).To(Equal("Never"))
					}
				}
				if name == "migrations and checks by somebody else" {
					Expect(weights).To(BeEmpty())
					return
				}
				Expect(weights["Job migrations"]).To(BeNumerically("<", weights["Job check"]))
				for kind, weight := range weights {
					if strings.HasPrefix(kind, "NetworkPolicy ") {
						Expect(weight).To(BeNumerically("<", weights["Job migrations"]))
					}
				}
			})
		})
	}

	It("has two pods of each program, and enough memory for the default configuration", func(ctx SpecContext) {
		for _, o := range render(ctx, "").of("Deployment") {
			Expect(o.Spec.Replicas).To(HaveValue(Equal(2)))
			c := o.Spec.Template.Spec.Containers[0]
			limit, unit := strings.CutSuffix(c.Resources.Limits["memory"], "Mi")
			Expect(unit).To(BeTrue())
			Expect(strconv.Atoi(limit)).To(BeNumerically(">=", loaded(o.component(), c).memory>>20), o.component())
			Expect(c.Resources.Limits["memory"]).To(Equal(c.Resources.Requests["memory"]))
		}
	})

	It("has a preStop hook only if the values ask for it", func(ctx SpecContext) {
		for _, o := range render(ctx, "").of("Deployment") {
			Expect(o.Spec.Template.Spec.Containers[0].Lifecycle.PreStop).To(BeNil())
		}
		seconds := map[string]int{}
		for _, o := range render(ctx, everything).of("Deployment") {
			seconds[o.component()] = o.Spec.Template.Spec.Containers[0].Lifecycle.PreStop.Sleep.Seconds
		}
		Expect(seconds).To(Equal(map[string]int{"api": 17, "relay": 13}))
	})

	It("passes values of the configuration on", func(ctx SpecContext) {
		all := render(ctx, everything)
		api := all.named("Deployment", "-api").Spec.Template.Spec.Containers[0]
		Expect(api.Env).To(ContainElements(
			variable{Name: "DIEHARD_HTTP_DOCS", Value: "off"},
			variable{Name: "DIEHARD_HTTP_RATE_LIMIT_PER_KEY", Value: "0.5"},
			variable{Name: "DIEHARD_OUTBOX_MAX_BACKLOG_BYTES", Value: "1000000000000"},
			variable{Name: "DIEHARD_LOG_LEVEL", Value: "warn"},
			variable{Name: "DIEHARD_POSTGRES_SCHEMA", Value: "diehard"},
		))
		relay := all.named("Deployment", "-relay").Spec.Template.Spec.Containers[0]
		expected := []any{
			variable{Name: "DIEHARD_RELAY_BATCH_MAX_ROWS", Value: "1000000"},
			variable{Name: "DIEHARD_HOUSEKEEPING_VACUUM", Value: "off"},
			variable{Name: "DIEHARD_LOG_LEVEL", Value: "debug"},
			variable{Name: "DIEHARD_POSTGRES_SCHEMA", Value: "diehard"},
		}
		Expect(relay.Env).To(ContainElements(expected...))
		Expect(all.named("Job", "-check").Spec.Template.Spec.Containers[0].Env).To(ContainElements(expected...), "the check has the configuration of the relay")
	})

	It("uses the Secrets that the values name, each for its program only", func(ctx SpecContext) {
		const dsn, destination = "DIEHARD_POSTGRES_DSN", "DIEHARD_CLICKHOUSE_DSN"
		Expect(secrets(render(ctx, everything+"\nmigrations: {secrets: {postgresDSN: {key: owner}}}"))).To(Equal(map[string]map[string]string{
			"api": {dsn: "api/postgres-dsn", "DIEHARD_API_KEYS": "api/api-keys", "DIEHARD_SENTRY_DSN": "sentry/api"},
			"relay": {
				dsn: "relay/postgres-dsn", destination: "relay/clickhouse-dsn", "DIEHARD_POSTGRES_LISTEN_DSN": "direct/listen-dsn",
				"DIEHARD_ADMIN_TOKEN": "operators/admin-token", "DIEHARD_SENTRY_DSN": "sentry/relay",
			},
			"relay-migrate": {dsn: "migrations/owner", destination: "migrations/clickhouse-dsn"},
			"api-migrate":   {dsn: "migrations/owner"},
			"check":         {dsn: "relay/postgres-dsn", destination: "relay/clickhouse-dsn", "DIEHARD_POSTGRES_LISTEN_DSN": "direct/listen-dsn"},
		}))
		Expect(secrets(render(ctx, ""))["relay"]).To(Equal(map[string]string{dsn: "relay/postgres-dsn", destination: "relay/clickhouse-dsn"}))
	})

	It("runs the commands of the programs in their images", func(ctx SpecContext) {
		commands := func(all objects) map[string]string {
			found := map[string]string{}
			for _, o := range all.workloads() {
				for _, c := range o.Spec.Template.Spec.all() {
					found[c.Name] = c.Image + " " + strings.Join(c.Args, " ")
				}
			}
			return found
		}
		const relay, digest = "registry.example.com/diehard-relay:v0.1.0", "registry.example.com/diehard-api@sha256:" +
			"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
		withoutAPI := map[string]string{"relay": relay + " run", "relay-migrate": relay + " migrate", "check": relay + " check"}
		Expect(commands(render(ctx, matrix["no API"]))).To(Equal(withoutAPI))
		all := maps.Clone(withoutAPI)
		all["api"], all["api-migrate"] = digest+" serve", digest+" migrate"
		Expect(commands(render(ctx, everything))).To(Equal(all))
	})

	It("allows the connections that the values describe, and no others", func(ctx SpecContext) {
		const dns = "53/TCP 53/UDP"
		Expect(connections(render(ctx, "networkPolicy: {enabled: true}"))).To(Equal(map[string]string{
			"api":        "in: http/TCP; out: " + dns + " 5432/TCP",
			"relay":      "in: ; out: " + dns + " 5432/TCP 9000/TCP",
			"migrations": "in: ; out: " + dns + " 5432/TCP 9000/TCP",
			"check":      "in: ; out: " + dns + " 5432/TCP 9000/TCP",
		}))
		Expect(connections(render(ctx, everything))).To(Equal(map[string]string{
			"api":        "in: http/TCP (1) admin/TCP (1); out: 53/TCP 53/UDP (1) 5432/TCP 6432/TCP (1) 4318/TCP (1) 443/TCP (1)",
			"relay":      "in: admin/TCP (1); out: 53/TCP 53/UDP (1) 5432/TCP 6432/TCP (1) 9440/TCP (1) 4318/TCP (1) 443/TCP (1)",
			"migrations": "in: ; out: 53/TCP 53/UDP (1) 5432/TCP 6432/TCP (1) 9440/TCP (1) 443/TCP (1)",
			"check":      "in: ; out: 53/TCP 53/UDP (1) 5432/TCP 6432/TCP (1) 9440/TCP (1) 443/TCP (1)",
		}))
		for endpoint, port := range map[string]string{
			"http://collector:4318": "4318", "http://collector/v1": "80", "https://collector": "443", "https://[2001:db8::1]:4317": "4317",
		} {
			all := render(ctx, "networkPolicy: {enabled: true}\notlp: {endpoint: '"+endpoint+"'}")
			Expect(connections(all)["relay"]).To(HaveSuffix(" "+port+"/TCP"), endpoint)
		}
	})

	It("publishes the API without its operators' port", func(ctx SpecContext) {
		for _, service := range render(ctx, everything).of("Service") {
			if service.Spec.Type != "" {
				Expect(service.Spec.Ports).To(Equal([]servicePort{{Name: "http", Port: 80, TargetPort: "http"}}))
			}
		}
	})

	It("sets the labels by which the alerts group", func(ctx SpecContext) {
		labels := map[string]bool{}
		all := render(ctx, everything)
		for _, monitor := range all.of("ServiceMonitor") {
			Expect(monitor.Spec.Endpoints[0].Path).To(Equal("/metrics"))
			for _, relabeling := range monitor.Spec.Endpoints[0].Relabelings {
				labels[relabeling.TargetLabel+"="+relabeling.Replacement] = true
			}
		}
		Expect(labels).To(And(HaveLen(3), HaveKey("job=outbox/shop-relay"), HaveKey("job=outbox/shop-api"), HaveKey("outbox=outbox/shop")))
		for _, service := range all.of("Service") {
			if service.Spec.ClusterIP == "None" {
				Expect(service.Spec.PublishNotReadyAddresses).To(BeTrue())
			}
		}
		for _, trigger := range all.of("ScaledObject")[0].Spec.Triggers {
			Expect(trigger.Metadata["query"]).To(ContainSubstring(`{job="outbox/shop-relay"`))
		}
	})

	It("contains the rules of deploy/prometheus", func(ctx SpecContext) {
		info, err := os.Lstat(chart + "/files/diehard.rules.yaml")
		Expect(err).NotTo(HaveOccurred())
		Expect(info.Mode().Type()).To(Equal(os.ModeSymlink), "a copy could differ")
		rules := render(ctx, everything).of("PrometheusRule")[0].Spec.Groups
		Expect(rules).To(Equal(parse(readFile("deploy/prometheus/diehard.rules.yaml"))["groups"]))
	})

	It("asks Prometheus the queries of its files", func(ctx SpecContext) {
		const selector = `job="relay",cluster="a"`
		fleet := render(ctx, matrix["a fleet that Prometheus knows by another name"]).of("ScaledObject")[0]
		Expect(fleet.Spec.Triggers).To(HaveLen(2))
		for _, trigger := range fleet.Spec.Triggers {
			query := readFile("deploy/helm/diehard/files/relay-" + trigger.Name + ".promql")
			Expect(trigger.Metadata["query"]).To(Equal(strings.ReplaceAll(query, "SELECTOR", selector)))
		}
	})
})

// secretVariable matches the names of variables whose values are secrets.
var secretVariable = regexp.MustCompile(`_(DSN|KEYS|TOKEN|PASSWORD)$`)

// imageOf returns the part of the Dockerfile that makes the program's image.
func imageOf(program string) string {
	GinkgoHelper()
	_, image, found := strings.Cut(readFile("Dockerfile"), " AS "+program+"\n")
	Expect(found).To(BeTrue())
	image, _, _ = strings.Cut(image, "\nFROM ")
	return image
}

func readFile(path string) string {
	GinkgoHelper()
	text, err := os.ReadFile(root + "/" + path)
	Expect(err).NotTo(HaveOccurred())
	return string(text)
}

// program returns the program of a container: api or relay.
func program(c container) string {
	if strings.Contains(c.Image, "/diehard-api") {
		return "api"
	}
	return "relay"
}

// variables returns the variables of a program's configuration.
func variables(program string) (names []string) {
	flags := pflag.NewFlagSet(program, pflag.ContinueOnError)
	if program == "api" {
		config.AddAPIFlags(flags)
	} else {
		config.AddRelayFlags(flags)
	}
	flags.VisitAll(func(flag *pflag.Flag) {
		names = append(names, "DIEHARD_"+strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_")))
	})
	return names
}

// settings is what the specs need to know of a program's configuration.
type settings struct {
	environment, http, admin string
	// stop is the sum of the time limits when the program stops.
	stop time.Duration
	// memory is what docs/configuration.md requires, in bytes.
	memory int64
}

// secretValues are the values of the Secrets.
var secretValues = map[string]string{
	"DIEHARD_POSTGRES_DSN":        "postgres://diehard:secret@postgres:5432/diehard",
	"DIEHARD_CLICKHOUSE_DSN":      "clickhouse://diehard:secret@clickhouse:9000/diehard",
	"DIEHARD_API_KEYS":            strings.Repeat("0a", 32),
	"DIEHARD_SENTRY_DSN":          "https://key@sentry.example.com/1",
	"DIEHARD_POSTGRES_LISTEN_DSN": "postgres://relay:secret@direct/diehard",

	"DIEHARD_ADMIN_TOKEN": strings.Repeat("token-", 8),
}

// loaded returns the configuration that a program reads in the container.
func loaded(program string, c container) settings {
	GinkgoHelper()
	restore := setEnvironment(c.Env)
	defer restore()
	if program == "api" {
		c, _, err := config.LoadAPI(config.LoadOptions{})
		Expect(err).NotTo(HaveOccurred())
		return settings{c.Environment, c.HTTP.Addr, c.Admin.Addr, c.HTTP.DrainDelay + c.HTTP.ShutdownTimeout, 128<<20 + 8*c.HTTP.BodyBudget}
	}
	r, _, err := config.LoadRelay(config.LoadOptions{})
	Expect(err).NotTo(HaveOccurred())
	return settings{r.Environment, "", r.Admin.Addr, r.Relay.ShutdownTimeout, 100<<20 + 3*r.Relay.BatchMaxBytes}
}

// setEnvironment sets the variables of a container, and returns a function that restores the
// variables of the suite.
func setEnvironment(variables []variable) (restore func()) {
	GinkgoHelper()
	before := map[string]*string{}
	for _, v := range variables {
		value := v.Value
		if v.ValueFrom != nil {
			Expect(secretValues).To(HaveKey(v.Name))
			value = secretValues[v.Name]
		}
		before[v.Name] = nil
		if old, ok := os.LookupEnv(v.Name); ok {
			before[v.Name] = &old
		}
		Expect(os.Setenv(v.Name, value)).To(Succeed())
	}
	return func() {
		for name, old := range before {
			if old == nil {
				Expect(os.Unsetenv(name)).To(Succeed())
				continue
			}
			Expect(os.Setenv(name, *old)).To(Succeed())
		}
	}
}

// port returns the port of an address of all interfaces.
func port(address string) int {
	GinkgoHelper()
	number, err := strconv.Atoi(strings.TrimPrefix(address, ":"))
	Expect(err).NotTo(HaveOccurred(), address)
	return number
}

// secrets returns the Secret and the key of each variable, by the name of the container.
func secrets(all objects) map[string]map[string]string {
	found := map[string]map[string]string{}
	for _, o := range all.workloads() {
		for _, c := range o.Spec.Template.Spec.all() {
			found[c.Name] = map[string]string{}
			for _, v := range c.Env {
				if v.ValueFrom != nil {
					found[c.Name][v.Name] = v.ValueFrom.SecretKeyRef.Name + "/" + v.ValueFrom.SecretKeyRef.Key
				}
			}
		}
	}
	return found
}

// connections describes the NetworkPolicy of each component: the ports, and the number of
// peers in parentheses unless all peers are allowed.
func connections(all objects) map[string]string {
	GinkgoHelper()
	found := map[string]string{}
	describe := func(rules []rule) string {
		var texts []string
		for _, rule := range rules {
			var ports []string
			for _, p := range rule.Ports {
				ports = append(ports, fmt.Sprintf("%v/%s", p.Port, p.Protocol))
			}
			slices.Sort(ports)
			text := strings.Join(ports, " ")
			if peers := len(rule.From) + len(rule.To); peers > 0 {
				text += fmt.Sprintf(" (%d)", peers)
			}
			texts = append(texts, text)
		}
		return strings.Join(texts, " ")
	}
	for _, o := range all.of("NetworkPolicy") {
		Expect(o.Spec.PolicyTypes).To(ConsistOf("Ingress", "Egress"))
		found[o.Metadata.Labels[componentLabel]] = "in: " + describe(o.Spec.Ingress) + "; out: " + describe(o.Spec.Egress)
	}
	return found
}
