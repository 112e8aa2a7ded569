"""Metrics, the log of calls, traces, and the HTTP endpoint that answers Prometheus and probes.

Every room above the transport may record here; this package knows calls, but neither services nor models.
"""
