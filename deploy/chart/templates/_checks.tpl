{{/* What no single value shows. Rendering stops with a sentence that says what to set. */}}
{{- define "slipstream.checks" -}}
{{- $values := .Values }}
{{- if not $values.insecureListen }}
{{- if not (and $values.tokens.existingSecret $values.tls.existingSecret) }}
{{- fail "the services listen beyond loopback: set tokens.existingSecret and tls.existingSecret, or insecureListen: true" }}
{{- end }}
{{- end }}
{{- if and $values.inference.enabled (not $values.inference.models) }}
{{- fail "inference.models: name at least one model to serve" }}
{{- end }}
{{- if and $values.chat.enabled (not $values.inference.enabled) (not (hasKey $values.chat.settings "inference_address")) }}
{{- fail "chat.settings.inference_address: needed where inference.enabled is false" }}
{{- end }}
{{- if and $values.chat.enabled (gt (int $values.chat.replicas) 1) (not $values.chat.database.existingSecret) }}
{{- fail "chat.replicas: more than 1 needs PostgreSQL; set chat.database.existingSecret" }}
{{- end }}
{{- if and $values.serviceMonitor.enabled $values.tokens.existingSecret (not $values.serviceMonitor.tokenSecret.name) }}
{{- fail "serviceMonitor.tokenSecret.name: metrics ask for a token where tokens.existingSecret is set" }}
{{- end }}
{{- end }}
