{{- define "sparse-serve.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sparse-serve.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "sparse-serve.labels" -}}
{{ include "sparse-serve.selector" . }}
app.kubernetes.io/version: {{ .Values.image.tag | trunc 63 | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "sparse-serve.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "sparse-serve.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "sparse-serve.check" -}}
{{- if and (empty .Values.model.claim) (empty .Values.model.fetch.image) -}}
{{- fail "model: give model.claim (a PersistentVolumeClaim that holds the checkpoint) or model.fetch.image (a container that writes it to /model)" -}}
{{- end -}}
{{- if and .Values.model.claim .Values.model.fetch.image -}}
{{- fail "model: give model.claim or model.fetch.image, not both" -}}
{{- end -}}
{{- if not (or .Values.auth.apiKeysSecret .Values.tls.secret .Values.auth.insecure) -}}
{{- fail "auth: give auth.apiKeysSecret, tls.secret, or both; or auth.insecure=true, where something in front does that" -}}
{{- end -}}
{{- if and .Values.tls.clientCASecret (empty .Values.tls.secret) -}}
{{- fail "tls: tls.clientCASecret wants tls.secret, too" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled .Values.auth.apiKeysSecret (empty .Values.serviceMonitor.keySecret) -}}
{{- fail "serviceMonitor: /metrics wants a key; give serviceMonitor.keySecret" -}}
{{- end -}}
{{- end -}}

{{- /* A probe: by the kubelet, or from inside where clients have to show a certificate. */ -}}
{{- define "sparse-serve.probe" -}}
{{- if .root.Values.tls.clientCASecret -}}
exec: {command: [sparse-serve-probe, {{ .path }}]}
{{- else -}}
httpGet: {path: /{{ .path }}, port: http, scheme: {{ ternary "HTTPS" "HTTP" (not (empty .root.Values.tls.secret)) }}}
{{- end -}}
{{- end -}}

{{- define "sparse-serve.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "sparse-serve.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if eq .Values.accelerator "nvidia" -}}
{{- $limits := set (default dict $resources.limits) .Values.gpu.resource .Values.gpu.count -}}
{{- $resources = set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- /* What cores and memory a CPU server sees; a GPU server asks its GPU. */ -}}
{{- define "sparse-serve.machine" -}}
{{- if eq .Values.accelerator "cpu" }}
- {name: VLLM_CPU_KVCACHE_SPACE, value: {{ .Values.cpu.kvCacheGiB | quote }}}
- {name: VLLM_CPU_OMP_THREADS_BIND, value: nobind}
- name: OMP_NUM_THREADS
  valueFrom: {resourceFieldRef: {containerName: {{ .container }}, resource: limits.cpu, divisor: "1"}}
{{- end }}
{{- end -}}

{{- define "sparse-serve.mounts" -}}
- {name: model, mountPath: /model, readOnly: true{{ with .Values.model.subPath }}, subPath: {{ . | quote }}{{ end }}}
- {name: cache, mountPath: /cache}
- {name: tmp, mountPath: /tmp}
- {name: shared-memory, mountPath: /dev/shm}
{{- end -}}
