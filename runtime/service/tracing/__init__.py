"""Traces of what the service does, in OpenTelemetry's form: where the time of a video goes."""
