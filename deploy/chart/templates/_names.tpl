{{/* Names, labels, ports and addresses. Every template takes a dict: root (the chart's context), name (the service). */}}

{{- define "slipstream.services" -}}
inference chat training adapters
{{- end }}

{{- define "slipstream.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- $full | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "slipstream.name" -}}
{{ include "slipstream.fullname" .root }}-{{ .name }}
{{- end }}

{{- define "slipstream.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end }}

{{- define "slipstream.labels" -}}
{{ include "slipstream.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "slipstream.serviceAccount" -}}
{{- $account := .Values.serviceAccount }}
{{- $account.name | default (ternary (include "slipstream.fullname" .) "default" $account.create) }}
{{- end }}

{{- define "slipstream.image" -}}
{{- $image := .root.Values.image }}
{{- $repository := (index .root.Values .name).image }}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ $repository }}:{{ default .root.Chart.AppVersion $image.tag }}
{{- end }}

{{/* The same arithmetic as the services': the base port, then one for each; metrics 1000 above, health 2000. */}}
{{- define "slipstream.port" -}}
{{- $offset := index (dict "inference" 0 "chat" 1 "training" 2 "adapters" 3) .name }}
{{- add (int .root.Values.basePort) $offset }}
{{- end }}

{{- define "slipstream.metricsPort" -}}
{{- add (include "slipstream.port" .) 1000 }}
{{- end }}

{{- define "slipstream.healthPort" -}}
{{- add (include "slipstream.port" .) 2000 }}
{{- end }}

{{- define "slipstream.address" -}}
{{ include "slipstream.name" . }}:{{ include "slipstream.port" . }}
{{- end }}

{{/* "true" or nothing. */}}
{{- define "slipstream.usesSqlite" -}}
{{- $service := index .root.Values .name }}
{{- if and (hasKey $service "database") (not $service.database.existingSecret) }}true{{ end }}
{{- end }}

{{/* Whether anything that must survive lies on the data volume: the database, the artifacts, the jobs. */}}
{{- define "slipstream.keepsData" -}}
{{- $onDisk := or (include "slipstream.usesSqlite" .) (eq .name "training") }}
{{- if eq .name "adapters" }}{{ $onDisk = or $onDisk (not .root.Values.adapters.artifacts.url) }}{{ end }}
{{- if and $onDisk (ne .name "inference") }}true{{ end }}
{{- end }}
