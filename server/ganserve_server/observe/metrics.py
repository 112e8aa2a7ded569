"""The server's metrics for Prometheus. Labels are bounded: an unknown model counts as "other"."""

import importlib.metadata
import platform
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OTHER = "other"


class Load:
    """The current load, read at each scrape: updating a gauge would cost time in every call.

    Args:
        read: returns the current numbers of connections and of calls.
        kept: returns the bytes that the server keeps for its peers, by kind.
    """

    def __init__(self, read: Callable[[], tuple[int, int]], kept: Callable[[], dict[str, int]] = dict) -> None:
        self._read, self._kept = read, kept

    def collect(self) -> Iterator[Metric]:
        """Return the gauges."""
        connections, calls = self._read()
        yield GaugeMetricFamily(
            "ganserve_connections",
            "Connections that are open now, without TLS handshakes that are not complete.",
            connections,
        )
        yield GaugeMetricFamily("ganserve_calls", "Running calls, including those of health and reflection.", calls)
        kept = GaugeMetricFamily(
            "ganserve_kept_bytes",
            "Bytes kept for clients: unfinished requests, those of health checks (unguarded), unread answers.",
            labels=["pool"],
        )
        for pool, size in self._kept().items():
            kept.add_metric([pool], size)
        yield kept


class Standstills:
    """How long event loops stood still, read at each scrape.

    Args:
        read: returns the longest standstill of the last one to two minutes, in seconds.
    """

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """Return the gauge."""
        yield GaugeMetricFamily(
            "ganserve_event_loop_standstill_seconds",
            "Longest time of the last one to two minutes for which an event loop of the server stood still.",
            self._read(),
        )


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # they would double the number of series
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = Counter(
            "ganserve_requests",
            "Finished calls by method, model (unknown ones: other), version that answered (or none) and gRPC status.",
            ["method", "model", "version", "code"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "ganserve_request_seconds",
            "From the call's arrival in the servicer until its last message is handed to gRPC.",
            ["method", "model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.cancellations = Counter(
            "ganserve_cancellations",
            "Calls that the caller cancelled, by stage: receiving, queued, computing or sending.",
            ["model", "stage"],
            registry=registry,
        )
        self.images = Counter("ganserve_images", "Images made.", ["model", "version"], registry=registry)
        self.padding_images = Counter(
            "ganserve_padding_images",
            "Images made and discarded: to pad a batch to a size that a GPU computes, or to compute a lone image as "
            "two.",
            ["model"],
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "ganserve_queue_seconds",
            "From acceptance until the first batch of a request (a stream's chunk, a group of GenerateEach) starts.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.compute_seconds = Histogram(
            "ganserve_compute_seconds",
            "One batch in the engine, latents included.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.encode_seconds = Histogram(
            "ganserve_encode_seconds",
            "Encoding one answer's images (not for RAW).",
            ["encoding"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "ganserve_batch_size", "Images in one batch.", ["model"], buckets=_IMAGES, registry=registry
        )
        self.batches_timed_out = Counter(
            "ganserve_batches_timed_out",
            "Batches that took longer than --batch-timeout-s; each takes a version out of service.",
            ["model"],
            registry=registry,
        )
        self.threads_lost = Counter(
            "ganserve_threads_lost",
            "Computing threads that do not come back from a batch, and were replaced.",
            registry=registry,
        )
        self.queue_images = Gauge(
            "ganserve_queue_images",
            "Images waiting now.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.rejections = Counter(
            "ganserve_rejections", "Requests refused by the server, by reason.", ["reason"], registry=registry
        )
        self.caller_images = Counter(
            "ganserve_caller_images",
            "Images of successful calls, by the name of the token that requested them.",
            ["caller"],
            registry=registry,
        )
        self.caller_limited = Counter(
            "ganserve_caller_limited",
            "Requests refused and streams delayed because of a token's rate, by token name and outcome (refused, "
            "delayed).",
            ["caller", "outcome"],
            registry=registry,
        )
        self.tls_failures = Counter(
            "ganserve_tls_failures",
            "Connections that ended in the TLS handshake, by reason.",
            ["reason"],
            registry=registry,
        )
        self.connections_aged = Counter(
            "ganserve_connections_aged", "Connections ended because of their age.", registry=registry
        )
        self.connections_ended = Counter(
            "ganserve_connections_ended",
            "Connections ended by the server, by reason: idle, crowded (another took its place), unread, flood, slow, "
            "protocol.",
            ["reason"],
            registry=registry,
        )
        for reason in ("idle", "crowded", "unread", "slow", "flood", "protocol"):
            self.connections_ended.labels(reason)  # so that the series exists from the start, with the value 0
        self.connections_turned_away = Counter(
            "ganserve_connections_turned_away",
            "Connections closed immediately, by reason: connections (--max-connections was reached), descriptors (too "
            "few file descriptors).",
            ["reason"],
            registry=registry,
        )
        for reason in ("connections", "descriptors"):
            self.connections_turned_away.labels(reason)
        self.log_lines_dropped = Counter(
            "ganserve_log_lines_dropped",
            "Log lines dropped, because standard error was not read or could not be written.",
            registry=registry,
        )
        self.file_reloads = Counter(
            "ganserve_file_reloads",
            "Changed files that were read again, by kind (certificates, tokens) and outcome (loaded, rejected).",
            ["kind", "outcome"],
            registry=registry,
        )
        self.files_rejected = Gauge(
            "ganserve_files_rejected",
            "Files that the server cannot use in their current state, by kind (models, certificates, tokens).",
            ["kind"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.files_quarantined = Gauge(
            "ganserve_files_quarantined",
            "Model files that are not loaded because a process ended, or did not go on, while it loaded or tried them.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.repository_unreadable = Gauge(
            "ganserve_repository_unreadable",
            "Paths in the repository that cannot be read; versions that were read before are served.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        # With a label: without one, the series would exist with the value 0 even if there is no certificate.
        self.certificate_expiry = Gauge(
            "ganserve_certificate_expiry_timestamp_seconds",
            "When the first certificate in use expires, of the server's certificates and of its callers' authorities.",
            ["certificate"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.queue_limit_images = Gauge(
            "ganserve_queue_limit_images",
            "Images that may wait for one model, in all workers together.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.provider_info = Gauge(
            "ganserve_provider_info",
            "1, with the requested provider, the running provider, and whether an NVIDIA driver exists (1 or 0).",
            ["asked", "running", "gpu"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.model_loads = Counter(
            "ganserve_model_loads",
            "Model files loaded, rejected or unloaded, by outcome.",
            ["outcome"],
            registry=registry,
        )
        # Gauges, because Infos cannot be added up over processes.
        self.model_info = Gauge(
            "ganserve_model_info",
            "1 for each served version, with its digest and its provider.",
            ["model", "version", "digest", "provider"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.model_image_bytes = Gauge(
            "ganserve_model_image_bytes",
            "Memory that one image of a served version takes on the CPU while it is made; 0: unknown, or on a GPU.",
            ["model", "version"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        import onnxruntime  # late, because a supervisor, which has no metrics of its own, does not need it

        Gauge(
            "ganserve_build_info",
            "1, with versions.",
            ["version", "python", "onnxruntime"],
            registry=registry,
            multiprocess_mode="livemax",
        ).labels(importlib.metadata.version("ganserve"), platform.python_version(), onnxruntime.__version__).set(1)
