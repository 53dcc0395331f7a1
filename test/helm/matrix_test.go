package helm_test

// everything turns everything on.
const everything = `
image: {pullSecrets: [registry]}
config: {log: {level: warn}, postgres: {schema: diehard}}
otlp: {endpoint: "http://collector.monitoring:4318"}
extraEnv: [{name: PGSSLROOTCERT, value: /etc/authority/ca.crt}]
extraVolumes: [{name: authority, secret: {secretName: authority}}]
extraVolumeMounts: [{name: authority, mountPath: /etc/authority, readOnly: true}]
serviceAccountName: diehard
api:
  image: {digest: sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef}
  autoscaling: {enabled: true}
  config: {http: {docs: off, trusted_proxies: 10.0.0.0/8, rate_limit_per_key: 0.5}, outbox: {max_backlog_bytes: 1000000000000}}
  secrets: {sentryDSN: {name: sentry, key: api}}
  service: {type: LoadBalancer, annotations: {example.com/scheme: internal}}
  preStopSeconds: 17
  podAnnotations: {example.com/note: api}
  podLabels: {example.com/team: users}
  nodeSelector: {kubernetes.io/arch: amd64}
  tolerations: [{key: users, operator: Exists}]
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/os, operator: In, values: [linux]}]}]}}}
  priorityClassName: high
relay:
  autoscaling: {enabled: true, prometheus: {serverAddress: "http://prometheus.monitoring:9090", authenticationRef: prometheus}}
  config: {relay: {workers: 4, batch_max_rows: 1000000, flush_timeout: 40s}, clickhouse: {cluster: "{cluster}"}, housekeeping: {vacuum: false}, log: {level: debug}}
  secrets: {listenDSN: {name: direct}, adminToken: {name: operators}, sentryDSN: {name: sentry, key: relay}}
  shutdownTimeoutSeconds: 45
  preStopSeconds: 13
  podAnnotations: {example.com/note: relay}
  podLabels: {example.com/team: events}
  nodeSelector: {kubernetes.io/arch: amd64}
  tolerations: [{key: events, operator: Exists}]
  priorityClassName: high
networkPolicy:
  enabled: true
  apiFrom: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ingress}}}]
  adminFrom: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]
  dns: {to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}}]}
  postgresql: {ports: [5432, 6432], to: [{ipBlock: {cidr: 10.1.0.0/16}}]}
  clickhouse: {ports: [9440], to: [{ipBlock: {cidr: 10.2.0.0/16}}]}
  otlp: {to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]}
  extraEgress: [{ports: [{protocol: TCP, port: 443}], to: [{ipBlock: {cidr: 10.3.0.0/16}}]}]
serviceMonitor: {enabled: true, labels: {release: prometheus}}
prometheusRule: {enabled: true, labels: {release: prometheus}}
`

// matrix are the sets of values for which each property of the chart is checked.
var matrix = map[string]string{
	"the required values": "",
	"everything":          everything,
	"no API":              "api: {enabled: false}\nnetworkPolicy: {enabled: true, adminFrom: [{podSelector: {}}]}\nserviceMonitor: {enabled: true}",
	"an API without authentication, by a boolean": "api: {config: {api: {auth: off}}, secrets: {apiKeys: {name: ''}}}",
	"one pod of each program":                     "api: {replicas: 1}\nrelay: {replicas: 1}",
	"no pods":                                     "api: {replicas: 0}\nrelay: {replicas: 0}",
	"migrations and checks by somebody else":      "migrations: {enabled: false, secrets: {postgresDSN: {name: ''}, clickhouseDSN: {name: ''}}}\ncheck: {enabled: false}\nnetworkPolicy: {enabled: true}",
	"users that the cluster chooses":              "securityContext: {runAsUser: null}\npodDisruptionBudget: {enabled: false}\ntopologySpread: []",
	"the longest name":                            "fullnameOverride: a-name-with-exactly-forty-small-letters1\nserviceMonitor: {enabled: true}\napi: {autoscaling: {enabled: true}}",
	"a long stop": "api: {drainDelaySeconds: 120, shutdownTimeoutSeconds: 60}\nrelay: {shutdownTimeoutSeconds: 300, config: {relay: {flush_timeout: 4m}}}\n" +
		"networkPolicy: {enabled: true}\notlp: {endpoint: 'https://collector.example.com/otlp'}",
	"a fleet that Prometheus knows by another name": "relay: {autoscaling: {enabled: true, prometheus: {serverAddress: 'http://prometheus', selector: 'job=\"relay\",cluster=\"a\"'}}}",
}
