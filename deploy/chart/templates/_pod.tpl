{{/* Recreate where two pods must not be at once: beside SQLite, and for the services that are one pod. */}}
{{- define "slipstream.strategy" -}}
{{- if eq .name "inference" }}
{{- toYaml .root.Values.inference.strategy }}
{{- else if or (include "slipstream.usesSqlite" .) (has .name (list "training" "adapters")) }}
{{- dict "type" "Recreate" | toYaml }}
{{- else }}
{{- dict "type" "RollingUpdate" "rollingUpdate" (dict "maxSurge" 1 "maxUnavailable" 0) | toYaml }}
{{- end }}
{{- end }}

{{/* Always more than the drain: a killed pod cuts the calls that the drain would have let end. */}}
{{- define "slipstream.terminationSeconds" -}}
{{- add (ceil .Values.drainGraceSeconds) .Values.extraTerminationSeconds }}
{{- end }}

{{- define "slipstream.podSpec" -}}
{{- $values := .root.Values }}
{{- $service := index $values .name }}
serviceAccountName: {{ include "slipstream.serviceAccount" .root }}
automountServiceAccountToken: false
# Variables of other Services would look like settings.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "slipstream.terminationSeconds" .root }}
{{- if eq .name "training" }}
# Processes that a job leaves behind are reaped by the pod, not by the service.
shareProcessNamespace: true
{{- end }}
{{- with $values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $service.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
containers:
  - name: {{ .name }}
    image: {{ include "slipstream.image" . | quote }}
    imagePullPolicy: {{ $values.image.pullPolicy }}
    args: [{{ .name }}]
    env:
      {{- include "slipstream.env" . | nindent 6 }}
    {{- if eq .name "adapters" }}
    {{- with $service.artifacts.existingSecret }}
    envFrom:
      - secretRef:
          name: {{ . }}
    {{- end }}
    {{- end }}
    ports:
      - {name: grpc, containerPort: {{ include "slipstream.port" . }}}
      - {name: metrics, containerPort: {{ include "slipstream.metricsPort" . }}}
      - {name: health, containerPort: {{ include "slipstream.healthPort" . }}}
    {{- include "slipstream.probes" . | nindent 4 }}
    resources:
      {{- include "slipstream.resources" $service | nindent 6 }}
    securityContext:
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities:
        drop: [ALL]
    volumeMounts:
      {{- include "slipstream.volumeMounts" . | nindent 6 }}
volumes:
  {{- include "slipstream.volumes" . | nindent 2 }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $service $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* On the plaintext port that serves only health. "Alive" for inference is its model directory, which answers from the
     first second on and while a worker restarts; for the others it is the whole service. */}}
{{- define "slipstream.probes" -}}
{{- $port := include "slipstream.healthPort" . }}
{{- $startup := (index .root.Values .name).startupTimeoutSeconds -}}
startupProbe:
  grpc: {port: {{ $port }}}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: {{ divf $startup 5 | ceil }}
readinessProbe:
  grpc: {port: {{ $port }}}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  grpc:
    port: {{ $port }}
    {{- if eq .name "inference" }}
    service: slipstream.inference.v1.ModelService
    {{- end }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{- define "slipstream.resources" -}}
{{- $resources := deepCopy .resources }}
{{- if and (hasKey . "gpu") (gt (int .gpu.count) 0) }}
{{- $limits := merge (dict .gpu.resource (int .gpu.count)) (default dict $resources.limits) }}
{{- $resources = merge (dict "limits" $limits) $resources }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "slipstream.env" -}}
{{- $values := .root.Values }}
{{- $service := index $values .name -}}
- name: SLIPSTREAM_CONFIG
  value: /etc/slipstream/slipstream.toml
{{- if hasKey $service "database" }}
{{- with $service.database.existingSecret }}
- name: SLIPSTREAM_{{ upper $.name }}_DATABASE_URL
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: {{ $service.database.key }}}
{{- end }}
{{- end }}
{{- if hasKey $service "cache" }}
{{- with $values.huggingFace.existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: {{ $values.huggingFace.key }}}
{{- end }}
{{- with $values.huggingFace.endpoint }}
- name: HF_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if $values.huggingFace.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- end }}
{{- with $service.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "slipstream.volumeMounts" -}}
{{- $values := .root.Values }}
{{- $service := index $values .name -}}
- {name: settings, mountPath: /etc/slipstream, readOnly: true}
- {name: scratch, mountPath: /tmp}
- {name: data, mountPath: /data}
{{- if hasKey $service "cache" }}
- {name: cache, mountPath: /cache}
{{- end }}
{{- if $service.sharedMemory }}
- {name: shared-memory, mountPath: /dev/shm}
{{- end }}
{{- if $values.tokens.existingSecret }}
- {name: tokens, mountPath: /run/secrets/slipstream/tokens, readOnly: true}
{{- end }}
{{- if $values.tls.existingSecret }}
- {name: tls, mountPath: /run/secrets/slipstream/tls, readOnly: true}
{{- end }}
{{- with $service.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "slipstream.volumes" -}}
{{- $values := .root.Values }}
{{- $service := index $values .name -}}
- name: settings
  configMap:
    name: {{ include "slipstream.name" . }}
- name: scratch
  emptyDir: {}
- name: data
  {{- if include "slipstream.keepsData" . }}
  {{- include "slipstream.claimOrScratch" (dict "scope" . "kind" "data") | nindent 2 }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- if hasKey $service "cache" }}
- name: cache
  {{- include "slipstream.claimOrScratch" (dict "scope" . "kind" "cache") | nindent 2 }}
{{- end }}
{{- if $service.sharedMemory }}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ $service.sharedMemory }}}
{{- end }}
{{- with $values.tokens.existingSecret }}
- name: tokens
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - {key: {{ $values.tokens.key }}, path: tokens}
{{- end }}
{{- with $values.tls.existingSecret }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- with $service.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "slipstream.claimOrScratch" -}}
{{- $volume := index (index .scope.root.Values .scope.name) .kind }}
{{- if not $volume.enabled -}}
emptyDir: {}
{{- else -}}
persistentVolumeClaim:
  claimName: {{ $volume.existingClaim | default (printf "%s-%s" (include "slipstream.name" .scope) .kind) }}
{{- end }}
{{- end }}
