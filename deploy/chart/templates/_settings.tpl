{{/* slipstream.toml of one service. Values are written as JSON, which TOML reads for text, numbers, booleans, lists. */}}
{{- define "slipstream.toml" -}}
{{- $values := .root.Values }}
{{- $service := index $values .name }}
{{- $common := dict
      "host" $values.host
      "base_port" (int $values.basePort)
      "data_dir" "/data"
      "log_format" "json"
      "drain_grace_s" $values.drainGraceSeconds
      "insecure_listen" $values.insecureListen }}
{{- if $values.tokens.existingSecret }}
{{- $_ := set $common "token_file" "/run/secrets/slipstream/tokens/tokens" }}
{{- end }}
{{- if $values.tls.existingSecret }}
{{- $_ := set $common "tls_cert" "/run/secrets/slipstream/tls/tls.crt" }}
{{- $_ := set $common "tls_key" "/run/secrets/slipstream/tls/tls.key" }}
{{- end }}
{{- $own := include "slipstream.ownSettings" . | fromJson -}}
{{ include "slipstream.table" (dict "name" "common" "table" (merge (deepCopy $values.settings) $common)) }}
{{- include "slipstream.table" (dict "name" .name "table" (merge (deepCopy $service.settings) $own)) }}
{{- end }}

{{/* What the chart knows of one service's own table, as JSON. */}}
{{- define "slipstream.ownSettings" -}}
{{- $values := .root.Values }}
{{- $own := dict }}
{{- if eq .name "inference" }}
{{- $_ := set $own "models" $values.inference.models }}
{{- end }}
{{- $peers := dict "chat" "inference" "inference" "adapters" "training" "adapters" }}
{{- if and (hasKey $peers .name) $values.tls.existingSecret }}
{{- $_ := set $own (printf "%s_tls_ca" (get $peers .name)) (printf "/run/secrets/slipstream/tls/%s" $values.tls.caKey) }}
{{- end }}
{{- if and (eq .name "adapters") $values.adapters.artifacts.url }}
{{- $_ := set $own "artifacts_url" $values.adapters.artifacts.url }}
{{- end }}
{{- range $peer := index (dict
      "inference" (list "adapters")
      "chat" (list "inference")
      "training" (list "adapters")
      "adapters" (list)) .name }}
{{- if (index $values $peer).enabled }}
{{- $_ := set $own (printf "%s_address" $peer) (include "slipstream.address" (dict "root" $.root "name" $peer)) }}
{{- end }}
{{- end }}
{{- toJson $own }}
{{- end }}

{{- define "slipstream.table" -}}
[{{ .name }}]
{{- range $key, $value := .table }}
{{ $key }} = {{ toRawJson $value }}
{{- end }}
{{ end }}
