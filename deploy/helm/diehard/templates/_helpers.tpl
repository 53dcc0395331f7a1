{{/* The prefix of all names. It is short enough for every suffix. */}}
{{- define "diehard.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* The labels of an object. Takes a dict with root and component. */}}
{{- define "diehard.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{ include "diehard.selector" . }}
app.kubernetes.io/version: {{ .root.Values.image.tag | trunc 63 | trimAll "._-" | quote }}
app.kubernetes.io/part-of: diehard
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end -}}

{{/* The labels of a pod. The chart's version is not one of them, because a new label would
replace the pods. Takes a dict with root, component and values. */}}
{{- define "diehard.podLabels" -}}
{{- with .values.podLabels }}
{{- toYaml . }}
{{ end }}
{{- include "diehard.selector" . }}
app.kubernetes.io/version: {{ .root.Values.image.tag | trunc 63 | trimAll "._-" | quote }}
app.kubernetes.io/part-of: diehard
{{- end -}}

{{/* The labels that select the pods of a component. They never change. */}}
{{- define "diehard.selector" -}}
app.kubernetes.io/name: diehard
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Annotations of a hook that runs before an installation and before an upgrade. */}}
{{- define "diehard.hook" -}}
helm.sh/hook: pre-install,pre-upgrade
helm.sh/hook-weight: {{ .weight | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}

{{/* The values of the metrics' labels job and outbox. */}}
{{- define "diehard.outbox" -}}
{{ .Release.Namespace }}/{{ include "diehard.fullname" . }}
{{- end -}}

{{/* An image. Takes a dict with root and image. */}}
{{- define "diehard.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .root.Values.image.tag }}
{{- end -}}
{{- end -}}

{{/* The keys of a program: the shared keys, overridden by its own. Takes a dict with root
and config. Returns YAML. */}}
{{- define "diehard.config" -}}
{{- mustMergeOverwrite (deepCopy .root.Values.config) (deepCopy .config) | toYaml -}}
{{- end -}}

{{/* A configuration value as text. YAML reads off as false. */}}
{{- define "diehard.scalar" -}}
{{- if kindIs "bool" . -}}
{{ ternary "on" "off" . }}
{{- else if kindIs "string" . -}}
{{ . }}
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end -}}

{{/* The environment variables of configuration keys. Takes a dict with root and config. */}}
{{- define "diehard.configEnv" -}}
- name: DIEHARD_ENVIRONMENT
  value: {{ .root.Values.environment | quote }}
{{- range $section, $keys := include "diehard.config" . | fromYaml }}
{{- range $key, $value := $keys }}
{{- if not (kindIs "invalid" $value) }}
- name: {{ printf "DIEHARD_%s_%s" $section $key | upper }}
  value: {{ include "diehard.scalar" $value | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* An environment variable from a Secret, if its name is set. Takes a dict with name and
ref. */}}
{{- define "diehard.secretEnv" -}}
{{- if .ref.name }}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .ref.name }}
      key: {{ .ref.key }}
{{- end }}
{{- end -}}

{{/* The variables of both programs that are not configuration. */}}
{{- define "diehard.otherEnv" -}}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "diehard.otlpEnv" -}}
{{- with .Values.otlp.endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* The environment of a relay command that reads both databases. Takes a dict with root
and secrets. */}}
{{- define "diehard.relayEnv" -}}
{{- include "diehard.configEnv" (dict "root" .root "config" .root.Values.relay.config) }}
{{- include "diehard.secretEnv" (dict "name" "DIEHARD_POSTGRES_DSN" "ref" .secrets.postgresDSN) }}
{{- with .secrets.listenDSN }}
{{- include "diehard.secretEnv" (dict "name" "DIEHARD_POSTGRES_LISTEN_DSN" "ref" .) }}
{{- end }}
{{- include "diehard.secretEnv" (dict "name" "DIEHARD_CLICKHOUSE_DSN" "ref" .secrets.clickhouseDSN) }}
{{- include "diehard.otherEnv" .root }}
{{- end -}}

{{/* The environment of an API command. Takes a dict with root and secrets. */}}
{{- define "diehard.apiEnv" -}}
{{- include "diehard.configEnv" (dict "root" .root "config" .root.Values.api.config) }}
{{- include "diehard.secretEnv" (dict "name" "DIEHARD_POSTGRES_DSN" "ref" .secrets.postgresDSN) }}
{{- include "diehard.otherEnv" .root }}
{{- end -}}

{{/* The part of a pod that is the same for all. Takes a dict with root and values: those of
the component that decides where the pod runs. */}}
{{- define "diehard.pod" -}}
automountServiceAccountToken: false
# Kubernetes would set variables such as DIEHARD_API_PORT, which look like configuration.
enableServiceLinks: false
{{- with .root.Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  {{- with .root.Values.securityContext.runAsUser }}
  runAsUser: {{ int64 . }}
  runAsGroup: {{ int64 . }}
  fsGroup: {{ int64 . }}
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.extraVolumes }}
volumes:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* The part of a container that is the same for all. */}}
{{- define "diehard.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- with .Values.extraVolumeMounts }}
volumeMounts:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The spread of a component's pods. The new pods of a rolling update spread among
themselves. Takes a dict with root and component. */}}
{{- define "diehard.spread" -}}
{{- $context := . }}
{{- with .root.Values.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - maxSkew: {{ .maxSkew | default 1 | int64 }}
    topologyKey: {{ .topologyKey }}
    whenUnsatisfiable: {{ .whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "diehard.selector" $context | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}
{{- end -}}

{{/* The probes of a program, and the hook before SIGTERM. A probe has more time than a check
of the program (2 seconds), so that /readyz names the failed check. Liveness does not depend
on the databases. Takes the values of the program. */}}
{{- define "diehard.lifecycle" -}}
livenessProbe:
  httpGet: { path: /livez, port: admin }
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: { path: /readyz, port: admin }
  periodSeconds: 5
  timeoutSeconds: 4
  failureThreshold: 2
{{- with int64 .preStopSeconds }}
lifecycle:
  preStop:
    sleep: { seconds: {{ . }} }
{{- end }}
{{- end -}}

{{/* What the pods of a release may connect to, as rules of a NetworkPolicy. Takes a dict
with root and destinations: a list of postgresql, clickhouse and otlp. */}}
{{- define "diehard.egress" -}}
{{- $policy := .root.Values.networkPolicy }}
{{- include "diehard.egressRule" (dict "to" $policy.dns.to "ports" $policy.dns.ports "protocols" (list "UDP" "TCP")) }}
{{- range .destinations }}
{{- $peers := index $policy . }}
{{- $ports := $peers.ports }}
{{- if eq . "otlp" }}
{{- $ports = list (include "diehard.otlpPort" $) }}
{{- end }}
{{- include "diehard.egressRule" (dict "to" $peers.to "ports" $ports "protocols" (list "TCP")) }}
{{- end }}
{{- with $policy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A rule with ports and, unless the list is empty, peers. */}}
{{- define "diehard.egressRule" }}
- ports:
    {{- range $port := .ports }}
    {{- range $.protocols }}
    - { protocol: {{ . }}, port: {{ int64 $port }} }
    {{- end }}
    {{- end }}
  {{- with .to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/* The port of otlp.endpoint, or the default port of its scheme. */}}
{{- define "diehard.otlpPort" -}}
{{- $endpoint := urlParse .root.Values.otlp.endpoint }}
{{- $port := regexFind ":[0-9]+$" $endpoint.host | trimPrefix ":" }}
{{- default (ternary "443" "80" (eq $endpoint.scheme "https")) $port }}
{{- end -}}

{{/* The limits of a Job. The status 2 of a program means an invalid configuration. Takes a
dict with backoffLimit and activeDeadlineSeconds. */}}
{{- define "diehard.job" -}}
backoffLimit: {{ int64 .backoffLimit }}
activeDeadlineSeconds: {{ int64 .activeDeadlineSeconds }}
podFailurePolicy:
  rules:
    - action: Ignore
      onPodConditions:
        - { type: DisruptionTarget, status: "True" }
    - action: FailJob
      onExitCodes: { operator: In, values: [2] }
{{- end -}}
