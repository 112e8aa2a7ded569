"""Prints the Grafana dashboard: python deploy/grafana/dashboard.py > deploy/grafana/dashboards/ganserve.json"""

import json
from dataclasses import dataclass, field
from typing import Any

REPLICAS = 'job="$job", instance=~"$instance"'
MODELS = f'{REPLICAS}, model=~"$model"'
CALLS = f'{MODELS}, method!~"StreamImages|GenerateEach"'  # streams last as long as their readers like
WINDOW = "[$__rate_interval]"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One panel; `queries` are PromQL by legend."""

    title: str
    unit: str  # Grafana's name of it
    queries: dict[str, str]
    description: str = ""
    kind: str = "timeseries"
    width: int = 8  # of 24
    steps: dict[str, float] = field(default_factory=dict)  # colours from these values on; green below


def rate(metric: str, by: str, labels: str = MODELS) -> str:
    return f"sum by ({by}) (rate({metric}{{{labels}}}{WINDOW}))"


def quantile(share: float, metric: str, by: str = "", labels: str = MODELS) -> str:
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', f'{by}, le' if by else 'le', labels)})"


def heatmap(title: str, unit: str, metric: str, description: str, labels: str = MODELS) -> Panel:
    query = f"sum by (le) (increase({metric}_bucket{{{labels}}}{WINDOW}))"
    return Panel(title, unit, {"{{le}}": query}, description, kind="heatmap")


def table(title: str, query: str, description: str, width: int = 12) -> Panel:
    return Panel(title, "none", {"": query}, description, kind="table", width=width)


ROWS = {
    "Overview": [
        Panel(
            "Replicas that answer",
            "none",
            {"": 'sum(up{job="$job"})'},
            kind="stat",
            width=4,
            steps={"red": 0, "green": 1},
        ),
        Panel("Requests/s", "reqps", {"": rate("ganserve_requests_total", "job")}, kind="stat", width=4),
        Panel("Images/s", "none", {"": rate("ganserve_images_total", "job")}, kind="stat", width=4),
        Panel(
            "Failed calls",
            "percentunit",
            {"": 'job:ganserve_request_errors_per_request:ratio_rate5m{job="$job"}'},
            "INTERNAL, UNAVAILABLE, UNKNOWN and DATA_LOSS, of all calls of five minutes.",
            kind="stat",
            width=4,
            steps={"orange": 0.001, "red": 0.0144},
        ),
        Panel(
            "p50",
            "s",
            {"": quantile(0.5, "ganserve_request_seconds", labels=CALLS)},
            "No streams.",
            kind="stat",
            width=4,
        ),
        Panel(
            "p99",
            "s",
            {"": quantile(0.99, "ganserve_request_seconds", labels=CALLS)},
            "No streams.",
            kind="stat",
            width=4,
        ),
        Panel("Requests by method", "reqps", {"{{method}}": rate("ganserve_requests_total", "method")}),
        Panel("Images by model", "none", {"{{model}}": rate("ganserve_images_total", "model")}, "A second."),
        Panel(
            "Calls that did not end with OK",
            "reqps",
            {"{{code}}": rate("ganserve_requests_total", "code", f'{MODELS}, code!="OK"')},
        ),
        Panel(
            "Latency",
            "s",
            {
                "p50": quantile(0.5, "ganserve_request_seconds", labels=CALLS),
                "p90": quantile(0.9, "ganserve_request_seconds", labels=CALLS),
                "p99": quantile(0.99, "ganserve_request_seconds", labels=CALLS),
            },
            "From arrival to the last message, in the server; no streams.",
        ),
        Panel(
            "p99 by model",
            "s",
            {"{{model}}": 'job_model:ganserve_request_seconds:p99_rate5m{job="$job", model=~"$model"}'},
        ),
        Panel(
            "Alerts that fire",
            "none",
            {
                "{{alertname}} {{instance}}": (
                    'sum by (alertname, instance) (ALERTS{alertname=~"Ganserve.*", alertstate="firing"})'
                )
            },
            "docs/operations/alerts.md has a section for each.",
        ),
    ],
    "Latency": [
        heatmap("Calls", "s", "ganserve_request_seconds", "How long calls took; no streams.", CALLS),
        heatmap("Wait in the queue", "s", "ganserve_queue_seconds", "Until a request's first batch began."),
        heatmap("Computing", "s", "ganserve_compute_seconds", "One batch in the engine, latents included."),
        Panel(
            "Where the time goes, p50",
            "s",
            {
                "call": quantile(0.5, "ganserve_request_seconds", labels=CALLS),
                "queue": quantile(0.5, "ganserve_queue_seconds"),
                "compute (a batch)": quantile(0.5, "ganserve_compute_seconds"),
            },
        ),
        Panel(
            "Where the time goes, p99",
            "s",
            {
                "call": quantile(0.99, "ganserve_request_seconds", labels=CALLS),
                "queue": quantile(0.99, "ganserve_queue_seconds"),
                "compute (a batch)": quantile(0.99, "ganserve_compute_seconds"),
            },
        ),
        Panel(
            "Encoding, p99",
            "s",
            {"{{encoding}}": quantile(0.99, "ganserve_encode_seconds", "encoding", REPLICAS)},
            "Of one answer's images; RAW needs none.",
        ),
    ],
    "Batches": [
        heatmap(
            "Images in a batch", "none", "ganserve_batch_size", "Batches grow with the load: what waits goes together."
        ),
        Panel(
            "Images in a batch, mean",
            "none",
            {"{{model}}": f"{rate('ganserve_batch_size_sum', 'model')} / {rate('ganserve_batch_size_count', 'model')}"},
        ),
        Panel("Batches", "ops", {"{{model}}": rate("ganserve_batch_size_count", "model")}, "A second."),
        Panel(
            "Computing an image",
            "s",
            {
                "{{model}}": (
                    f"{rate('ganserve_compute_seconds_sum', 'model')} / {rate('ganserve_batch_size_sum', 'model')}"
                )
            },
            "The time of a batch, shared by its images.",
        ),
        Panel(
            "Computing batches",
            "none",
            {"{{instance}} {{model}}": rate("ganserve_compute_seconds_sum", "instance, model")},
            "How many batches are computed at a time, on average: the cores (or the GPU) that are busy with it.",
        ),
        Panel(
            "Padding images",
            "none",
            {"{{model}}": rate("ganserve_padding_images_total", "model")},
            "A second; on a GPU alone.",
        ),
    ],
    "Queue": [
        Panel("Images that wait", "none", {"{{instance}} {{model}}": f"ganserve_queue_images{{{MODELS}}}"}),
        Panel(
            "Of the queue's limit",
            "percentunit",
            {"{{instance}} {{model}}": f"job_instance_model:ganserve_queue_images:ratio{{{MODELS}}}"},
            "--max-queue-images; beyond it requests are refused.",
            steps={"orange": 0.8},
        ),
        Panel(
            "Wait in the queue",
            "s",
            {
                "p50 {{model}}": quantile(0.5, "ganserve_queue_seconds", "model"),
                "p99 {{model}}": quantile(0.99, "ganserve_queue_seconds", "model"),
            },
        ),
    ],
    "Rejections": [
        Panel("Rejections by reason", "reqps", {"{{reason}}": rate("ganserve_rejections_total", "reason", REPLICAS)}),
        Panel(
            "Refused, of all calls",
            "percentunit",
            {
                "for want of capacity": 'job:ganserve_saturation_rejections_per_request:ratio_rate5m{job="$job"}',
                "no valid token": 'job:ganserve_unknown_caller_rejections_per_request:ratio_rate5m{job="$job"}',
            },
            steps={"red": 0.05},
        ),
        Panel(
            "Callers that left",
            "reqps",
            {"{{model}} {{stage}}": rate("ganserve_cancellations_total", "model, stage")},
            "By what was being done for them.",
        ),
    ],
    "Models": [
        table(
            "Versions that are served",
            f"count by (model, version, digest, provider) (ganserve_model_info{{{MODELS}}} == 1)",
            "And by how many replicas.",
            width=16,
        ),
        Panel(
            "Memory of an image",
            "bytes",
            {"{{model}} {{version}}": f"max by (model, version) (ganserve_model_image_bytes{{{MODELS}}})"},
            "While it is made on the CPU; --batch-memory-mib bounds that of a batch.",
        ),
        Panel("Images by version", "none", {"{{model}} {{version}}": rate("ganserve_images_total", "model, version")}),
        Panel(
            "Files loaded and rejected, versions unloaded",
            "none",
            {"{{instance}} {{outcome}}": f"ganserve_model_loads_total{{{REPLICAS}}}"},
            "Since the start of the replica.",
        ),
        table(
            "Asked for, and what computes",
            f"ganserve_provider_info{{{REPLICAS}}} == 1",
            "A provider for each replica.",
            width=16,
        ),
    ],
    "Connections": [
        Panel("Connections", "none", {"{{instance}}": f"ganserve_connections{{{REPLICAS}}}"}),
        Panel("Calls that run", "none", {"{{instance}}": f"ganserve_calls{{{REPLICAS}}}"}),
        Panel(
            "Connections ended by the server, or turned away",
            "none",
            {
                "{{instance}}, {{reason}}": rate("ganserve_connections_ended_total", "instance, reason", REPLICAS),
                "{{instance}}, aged": rate("ganserve_connections_aged_total", "instance", REPLICAS),
                "{{instance}}, turned away": rate("ganserve_connections_turned_away_total", "instance", REPLICAS),
            },
            "A second (--max-connection-age-s, --max-connections, --idle-timeout-s, --write-timeout-s).",
        ),
        Panel(
            "Kept for clients",
            "bytes",
            {"{{instance}}, {{pool}}": f"ganserve_kept_bytes{{{REPLICAS}}}"},
            "Unfinished requests, and answers that are not read; docs/bounds.md has their bounds.",
        ),
    ],
    "Processes": [
        Panel("Cores that are busy", "none", {"{{instance}}": rate("process_cpu_seconds_total", "instance", REPLICAS)}),
        Panel("Memory", "bytes", {"{{instance}}": f"process_resident_memory_bytes{{{REPLICAS}}}"}, "Of all workers."),
        Panel(
            "Open files, of those allowed",
            "percentunit",
            {"{{instance}}": f"process_open_fds{{{REPLICAS}}} / process_max_fds{{{REPLICAS}}}"},
            steps={"orange": 0.8},
        ),
        Panel(
            "Time since the start",
            "s",
            {"{{instance}}": f"time() - process_start_time_seconds{{{REPLICAS}}}"},
            "Of the newest worker.",
        ),
        Panel("Workers", "none", {"{{instance}}": f"ganserve_workers{{{REPLICAS}}}"}, "Of replicas that have several."),
        Panel(
            "Workers that answer no calls, and replaced ones",
            "none",
            {
                "missing {{instance}}": f"ganserve_workers_missing{{{REPLICAS}}}",
                "{{reason}} {{instance}}": f"increase(ganserve_workers_replaced_total{{{REPLICAS}}}[1h])",
            },
            "Of replicas that have several; replaced in the last hour.",
        ),
        Panel(
            "Longest standstill of an event loop",
            "s",
            {"{{instance}}": f"ganserve_event_loop_standstill_seconds{{{REPLICAS}}}"},
            "Of the last one to two minutes; after --stuck-timeout-s, the worker is replaced or the process ends.",
            steps={"orange": 2},
        ),
        table(
            "Versions of the server",
            f"count by (version, python, onnxruntime) (ganserve_build_info{{{REPLICAS}}})",
            "",
            width=8,
        ),
    ],
    "Certificates and callers": [
        Panel(
            "Until a certificate ends",
            "s",
            {"{{instance}} {{certificate}}": (f"ganserve_certificate_expiry_timestamp_seconds{{{REPLICAS}}} - time()")},
            "Of the server's, and of the authorities of its callers.",
            kind="stat",
            width=24,
            steps={"red": 0, "orange": 2 * 86400, "green": 14 * 86400},
        ),
        Panel(
            "TLS handshakes that failed",
            "reqps",
            {"{{reason}}": rate("ganserve_tls_failures_total", "reason", REPLICAS)},
        ),
        Panel(
            "Changed files read again",
            "none",
            {"{{instance}} {{kind}} {{outcome}}": f"ganserve_file_reloads_total{{{REPLICAS}}}"},
            "Since the start of the replica; rejected: what was read before stays in use.",
        ),
        Panel(
            "Files that cannot be used now",
            "none",
            {"{{instance}} {{kind}}": f"ganserve_files_rejected{{{REPLICAS}}}"},
            "Models, certificates and tokens; the replica's log says what is wrong with them.",
        ),
        Panel(
            "Images by caller",
            "none",
            {"{{caller}}": rate("ganserve_caller_images_total", "caller", REPLICAS)},
            "A second, by the name of the token.",
        ),
        Panel(
            "Callers held at their rate",
            "reqps",
            {"{{caller}} {{outcome}}": rate("ganserve_caller_limited_total", "caller, outcome", REPLICAS)},
            "Requests refused, and waits of streams, by the name of the token.",
        ),
    ],
    "GPU (NVIDIA's DCGM exporter)": [
        Panel("GPU busy", "percent", {"{{Hostname}} {{gpu}}": "DCGM_FI_DEV_GPU_UTIL"}),
        Panel("Tensor cores busy", "percentunit", {"{{Hostname}} {{gpu}}": "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"}),
        Panel("Memory", "decmbytes", {"{{Hostname}} {{gpu}}": "DCGM_FI_DEV_FB_USED"}),
        Panel("Power", "watt", {"{{Hostname}} {{gpu}}": "DCGM_FI_DEV_POWER_USAGE"}),
        Panel("Temperature", "celsius", {"{{Hostname}} {{gpu}}": "DCGM_FI_DEV_GPU_TEMP"}),
        Panel("Last error (XID)", "none", {"{{Hostname}} {{gpu}}": "DCGM_FI_DEV_XID_ERRORS"}),
    ],
}


def variable(name: str, query: str, multi: bool = True) -> dict[str, Any]:
    wanted = {"query": query, "refId": name}
    shown: dict[str, Any] = {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": wanted,
        "refresh": 2,
        "sort": 1,
    }
    return {
        **shown,
        "multi": multi,
        "includeAll": multi,
        **({"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}} if multi else {}),
    }


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    shown: dict[str, Any] = {"unit": panel.unit}
    if panel.unit != "s" or panel.kind == "timeseries":
        shown["min"] = 0
    if panel.kind == "timeseries":
        shown["custom"] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.steps:
        first = {"color": next(iter(panel.steps)) if 0 in panel.steps.values() else "green", "value": None}
        steps = [{"color": colour, "value": value} for colour, value in panel.steps.items() if value]
        shown["thresholds"] = {"mode": "absolute", "steps": [first, *steps]}
    options: dict[str, dict[str, Any]] = {
        "timeseries": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "heatmap": {
            "calculate": False,
            "yAxis": {"unit": panel.unit},
            "color": {"mode": "scheme", "scheme": "Oranges"},
        },
        "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"},
        "table": {"showHeader": True},
    }
    how: dict[str, dict[str, Any]] = {"heatmap": {"format": "heatmap"}, "table": {"format": "table", "instant": True}}
    json_: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": 4 if panel.kind == "stat" else 8},
        "fieldConfig": {"defaults": shown, "overrides": []},
        "options": options[panel.kind],
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend, **how.get(panel.kind, {})}
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
    }
    if panel.kind == "table":
        json_["transformations"] = [{"id": "organize", "options": {"excludeByName": {"Time": True, "__name__": True}}}]
    return json_


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
            }
        )
        y, x, height = y + 1, 0, 0
        for panel in row:
            if x + panel.width > 24:
                y, x = y + height, 0
            panels.append(panel_json(panel, len(panels) + 1, x, y))
            x, height = x + panel.width, panels[-1]["gridPos"]["h"]
        y += height
    return {
        "uid": "ganserve",
        "title": "ganserve",
        "tags": ["ganserve"],
        "schemaVersion": 38,
        "editable": False,
        "graphTooltip": 1,  # one crosshair for all panels
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "refresh": 1},
                variable("job", "label_values(ganserve_build_info, job)", multi=False),
                variable("instance", 'label_values(ganserve_build_info{job="$job"}, instance)'),
                variable("model", 'label_values(ganserve_model_info{job="$job"}, model)'),
            ]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))
