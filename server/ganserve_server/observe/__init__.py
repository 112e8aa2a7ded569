"""Metrics, the log of calls, traces, and the HTTP endpoint that answers Prometheus and probes.

Every package above the transport may record here. Knows calls, but neither services nor models. May import errors, the
transport and settings, and nothing above them.
"""
