{{- define "ganserve.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end -}}
{{- end }}

{{- define "ganserve.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ganserve.labels" -}}
{{ include "ganserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "ganserve.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}
{{- else }}{{ .repository }}:{{ .tag | default (printf "%s%s" $.Chart.AppVersion (ternary "-gpu" "" $.Values.gpu.enabled)) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "ganserve.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "ganserve.name" .) }}
{{- end }}

{{- /* A number as the server reads it: Helm's own text of 10000000 is 1e+07. */ -}}
{{- define "ganserve.value" -}}
{{- if kindIs "float64" . }}{{ if eq (floor .) . }}{{ int64 . }}{{ else }}{{ . }}{{ end }}{{ else }}{{ . }}{{ end -}}
{{- end }}

{{- define "ganserve.cage" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{- define "ganserve.ready" -}}
{{- if .Values.tls.existingSecret -}}
httpGet: { path: /readyz, port: metrics }
{{- else -}}
grpc: { port: 50051 }
{{- end }}
{{- end }}
