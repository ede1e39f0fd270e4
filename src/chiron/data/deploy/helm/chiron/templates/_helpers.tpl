{{- define "chiron.labels" -}}
app.kubernetes.io/name: chiron
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* The config as TOML. Helm has all numbers as floats, and its own toToml writes them so; Chiron tells 8080 from
8080.0. Tables of the first two levels have headers, what is below them stands in one line. */ -}}
{{- define "chiron.toml" -}}
{{- $config := include "chiron.config" . | fromJson -}}
{{- include "chiron.keys" $config -}}
{{- range $section, $table := $config }}
{{- if kindIs "map" $table }}
{{- $keys := include "chiron.keys" $table }}
{{- if or $keys (empty $table) }}
[{{ include "chiron.key" $section }}]
{{- $keys }}
{{ end }}
{{- range $name, $inner := $table }}
{{- if kindIs "map" $inner }}
[{{ include "chiron.key" $section }}.{{ include "chiron.key" $name }}]
{{- range $key, $value := $inner }}
{{- if not (kindIs "invalid" $value) }}
{{ include "chiron.key" $key }} = {{ include "chiron.value" $value }}
{{- end }}
{{- end }}
{{ end }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* "true" where there are several gateways. One that is left of them is as each of them was: were it another kind of
workload, the new one would scale beside the old ones, which it does not know, until they have ended. */ -}}
{{- define "chiron.several" -}}
{{- if or (gt (int .Values.gateways.replicas) 1) .Values.gateways.certificateSecret -}}true{{- end -}}
{{- end -}}

{{- /* config with what several gateways need: where their certificates and the database's password are mounted. */ -}}
{{- define "chiron.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- if include "chiron.several" . | eq "true" -}}
{{- if not (dig "store" "url" "" $config) -}}
{{- fail "gateways.replicas is above 1, or gateways.certificateSecret is set: config.store.url must name the PostgreSQL that they share (docs/gateways.md)" -}}
{{- end -}}
{{- $certificates := "/etc/chiron-gateways" -}}
{{- $ours := dict "listen" (printf "0.0.0.0:%d" (int .Values.gateways.port)) "certificate" (printf "%s/tls.crt" $certificates) "key" (printf "%s/tls.key" $certificates) "ca" (printf "%s/ca.crt" $certificates) -}}
{{- $_ := set $config "gateways" (merge (default dict $config.gateways) $ours) -}}
{{- else if not (dig "gateways" "certificate" "" $config) -}}
{{- $_ := unset $config "gateways" -}}
{{- end -}}
{{- if .Values.gateways.databaseSecret.name -}}
{{- $file := dict "password_file" (printf "/etc/chiron-database/%s" .Values.gateways.databaseSecret.key) -}}
{{- $_ := set $config "store" (merge (default dict $config.store) $file) -}}
{{- end -}}
{{- $config | toJson -}}
{{- end -}}

{{- /* What stands in a table before the tables inside it. */ -}}
{{- define "chiron.keys" -}}
{{- range $key, $value := . }}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) }}
{{ include "chiron.key" $key }} = {{ include "chiron.value" $value }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "chiron.key" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}

{{- define "chiron.value" -}}
{{- if kindIs "slice" . -}}
[{{ range $i, $item := . }}{{ if $i }}, {{ end }}{{ include "chiron.value" $item }}{{ end }}]
{{- else if kindIs "map" . -}}
{ {{- $first := true -}}
{{- range $key, $value := . -}}
{{- if not (kindIs "invalid" $value) -}}
{{ if not $first }},{{ end }} {{ include "chiron.key" $key }} = {{ include "chiron.value" $value -}}
{{- $first = false -}}
{{- end -}}
{{- end }} }
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{ printf "%d" (int64 .) }}
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end -}}

{{- /* Seconds that the gateway needs to end: server.grace as Chiron reads it ("30s", "1m30s", 30), and half a minute;
of several, preStop as well. */ -}}
{{- define "chiron.grace" -}}
{{- $units := dict "" 1.0 "ms" 0.001 "s" 1.0 "m" 60.0 "h" 3600.0 "d" 86400.0 -}}
{{- $seconds := 30.0 -}}
{{- range $part := regexFindAll "[0-9.]+[a-z]*" (toString (default "30s" .Values.config.server.grace)) -1 -}}
{{- $seconds = addf $seconds (mulf (float64 (regexFind "^[0-9.]+" $part)) (get $units (regexFind "[a-z]*$" $part))) -}}
{{- end -}}
{{- $wait := ternary .Values.gateways.preStopSeconds 0 (include "chiron.several" . | eq "true") -}}
{{- add (ceil $seconds | int64) $wait -}}
{{- end -}}

{{- /* The workloads that the config names, as a JSON list. */ -}}
{{- define "chiron.workloads" -}}
{{- $found := list -}}
{{- $kinds := list (list "deployment" "apps" "deployments") (list "statefulset" "apps" "statefulsets") (list "leaderworkerset" "leaderworkerset.x-k8s.io" "leaderworkersets") -}}
{{- range $name, $model := .Values.config.models -}}
{{- range $instance := ($model.instances | default (list $model)) -}}
{{- with $instance.kubernetes -}}
{{- $workload := . -}}
{{- $writes := and (not $.Values.advise) (ne (default "chiron" $workload.scaler) "external") -}}
{{- range $kind := $kinds -}}
{{- with (get $workload (index $kind 0)) -}}
{{- $found = append $found (dict "name" . "namespace" (default "" $workload.namespace) "group" (index $kind 1) "plural" (index $kind 2) "writes" $writes) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $found | toJson -}}
{{- end -}}

{{- /* Labels of what belongs to the staged model; of the chart and the name of the object. */ -}}
{{- define "chiron.staged" -}}
app: {{ index . 1 }}
app.kubernetes.io/part-of: {{ (index . 0).Values.staged.name }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
{{- end -}}

{{- /* What pods of stages and heads have in common. */ -}}
{{- define "chiron.stagedPod" -}}
{{- with .Values.imagePullSecrets -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{ end -}}
# It asks the API server nothing.
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  fsGroup: 10001
  seccompProfile:
    type: RuntimeDefault
volumes:
  - name: model
    {{- if .Values.staged.volume }}
    {{- toYaml .Values.staged.volume | nindent 4 }}
    {{- else }}
    persistentVolumeClaim:
      claimName: {{ .Values.staged.claim }}
      readOnly: true
    {{- end }}
  - name: tmp
    emptyDir: {}
  {{- with .Values.staged.certificateSecret }}
  - name: certificates
    secret:
      secretName: {{ . }}
      defaultMode: 0440
  {{- end }}
{{- end -}}

{{- /* What head and stages show one another, as arguments. */ -}}
{{- define "chiron.stagedTls" -}}
{{- if .Values.staged.certificateSecret -}}
- --tls-cert=/etc/chiron-stages/tls.crt
- --tls-key=/etc/chiron-stages/tls.key
- --tls-ca=/etc/chiron-stages/ca.crt
{{- end -}}
{{- end -}}

{{- define "chiron.stagedContainer" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
volumeMounts:
  - name: model
    mountPath: {{ .Values.staged.model }}
    readOnly: true
  - name: tmp
    mountPath: /tmp
  {{- if .Values.staged.certificateSecret }}
  - name: certificates
    mountPath: /etc/chiron-stages
    readOnly: true
  {{- end }}
{{- end -}}
