{{/* The name of everything, and what a part of it is called. */}}
{{- define "wanforge.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "wanforge.labels" -}}
{{ include "wanforge.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "wanforge.selector" -}}
app.kubernetes.io/name: wanforge
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* An image: (list root target digest) */}}
{{- define "wanforge.image" -}}
{{- $root := index . 0 }}{{- $target := index . 1 }}{{- $digest := index . 2 }}
{{- if $digest -}}
{{ $root.Values.image.repository }}@{{ $digest }}
{{- else -}}
{{ $root.Values.image.repository }}:{{ $root.Values.image.tag | default $root.Chart.AppVersion }}-{{ $target }}
{{- end }}
{{- end }}

{{/* What all pods have. */}}
{{- define "wanforge.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "wanforge.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* The environment of the API and of workers. */}}
{{- define "wanforge.environment" -}}
env:
  - name: PGSERVICEFILE
    value: /etc/wanforge-database/pg_service.conf
  {{- with .Values.bundles.kernels }}
  - name: WANFORGE_KERNELS
    value: {{ . | quote }}
  {{- end }}
  {{- range $name, $value := .Values.results.environment }}
  - name: {{ $name }}
    value: {{ $value | quote }}
  {{- end }}
{{- with .Values.results.secret }}
envFrom:
  - secretRef:
      name: {{ . | quote }}
{{- end }}
ports:
  - name: http
    containerPort: 8000
volumeMounts:
  - {name: settings, mountPath: /etc/wanforge, readOnly: true}
  - {name: database, mountPath: /etc/wanforge-database, readOnly: true}
  - {name: bundles, mountPath: /bundles, readOnly: true}
  - {name: data, mountPath: /var/lib/wanforge}
  - {name: tmp, mountPath: /tmp}
{{- end }}

{{/* The volumes of the API and of workers: (list root size), with the size of their own folder. */}}
{{- define "wanforge.volumes" -}}
{{- $root := index . 0 }}
volumes:
  - name: settings
    configMap:
      name: {{ include "wanforge.name" $root }}
  - name: database
    secret:
      secretName: {{ $root.Values.database.secret | quote }}
      defaultMode: 0440
  - name: bundles
    persistentVolumeClaim:
      claimName: {{ include "wanforge.claim" $root }}
  - name: data
    emptyDir:
      sizeLimit: {{ index . 1 | quote }}
  - name: tmp
    emptyDir:
      sizeLimit: 2Gi
{{- end }}

{{- define "wanforge.claim" -}}
{{ .Values.bundles.claim | default (printf "%s-bundles" (include "wanforge.name" .)) | quote }}
{{- end }}
