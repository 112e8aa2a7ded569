"""What workers count together: sums over the live and the ended ones, in memory."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import Collector

from ganserve_server.observe.metrics import Metrics
from ganserve_server.observe.shared_metrics import WorkersMetrics, count_in

PROMETHEUS_CLIENT = f"prometheus-client {version('prometheus-client')}"


@pytest.fixture(autouse=True)
def values_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus_client.values, "ValueClass", prometheus_client.values.ValueClass)


@pytest.fixture
def workers() -> WorkersMetrics:
    return WorkersMetrics()


def count_as(workers: WorkersMetrics, number: int) -> CollectorRegistry:
    """Have metrics that are made from now on be those of a worker; return a registry for them."""
    with workers.memory_of(number) as descriptor:
        count_in(os.dup(descriptor))
    return CollectorRegistry()


def samples(collector: Collector) -> dict[str, float]:
    return dict(sample_lines(collector))


def sample_lines(collector: Collector) -> Iterator[tuple[str, float]]:
    registry = CollectorRegistry()
    registry.register(collector)
    for line in prometheus_client.generate_latest(registry).decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            yield name, float(value)


def test_a_metric_of_a_worker_is_in_its_memory(workers: WorkersMetrics) -> None:
    registry = count_as(workers, 0)
    Counter("calls", "Calls.", registry=registry).inc()
    assert samples(workers) == {"calls_total": 1.0}, f"{PROMETHEUS_CLIENT}: metrics do not make values by ValueClass"


def test_the_supervisor_reports_what_the_only_worker_would(workers: WorkersMetrics) -> None:
    count_as(workers, 0)
    metrics = Metrics()
    for seconds in (0.0004, 0.0005, 0.3, 100.0):
        metrics.request_seconds.labels("GenerateImages", "mlp").observe(seconds)
    metrics.request_seconds.labels("ListModels", "ü\ud800").observe(2)
    metrics.requests.labels("GenerateImages", "mlp", "1", "OK").inc()
    metrics.images.labels("mlp", "1").inc(64)
    metrics.queue_images.labels("mlp").inc(3)
    metrics.queue_images.labels("mlp").dec(1)
    metrics.model_info.labels("mlp", "1", "abc", "CPU").set(1)
    ours = {metric.name: metric for metric in workers.collect()}
    alone = {metric.name: metric for metric in metrics.registry.collect() if metric.name.startswith("ganserve_")}
    assert {name for name, metric in alone.items() if metric.samples} == ours.keys()
    for name, metric in ours.items():
        assert (metric.documentation, metric.type) == (alone[name].documentation, alone[name].type)
        key = lambda sample: (sample.labels.get("model", ""), sample.name, float(sample.labels.get("le", 0)))  # noqa: E731
        assert sorted(metric.samples, key=key) == sorted(alone[name].samples, key=key)


def test_counters_of_an_ended_worker_stay_and_its_gauges_do_not(workers: WorkersMetrics) -> None:
    for number in (0, 1):
        registry = count_as(workers, number)
        Counter("calls", "Calls.", ["code"], registry=registry).labels("OK").inc(number + 1)
        Histogram("seconds", "Seconds.", buckets=(1, 2), registry=registry).observe(number + 0.5)
        for mode in ("livesum", "livemax", "livemin"):
            Gauge(mode, "A gauge.", registry=registry, multiprocess_mode=mode).set(number + 5)
    both = samples(workers)
    assert both['calls_total{code="OK"}'] == 3
    assert (both["livesum"], both["livemax"], both["livemin"]) == (11, 6, 5)
    assert [both[f'seconds_bucket{{le="{le}"}}'] for le in ("1.0", "2.0", "+Inf")] == [1, 2, 2]
    assert (both["seconds_count"], both["seconds_sum"]) == (2, 2.0)
    workers.ended(1)
    after = samples(workers)
    assert (after["livesum"], after["livemax"], after["livemin"]) == (5, 5, 5)
    counted = ("calls", "seconds")
    assert {name: value for name, value in after.items() if name.startswith(counted)} == {
        name: value for name, value in both.items() if name.startswith(counted)
    }
    workers.ended(0)
    assert not [name for name in samples(workers) if name.startswith("live")]


# A program of its own, so that it may fork. Each worker adds series and counts until it is killed.
KILLED = """
import os, signal, time
from pathlib import Path
from prometheus_client import Counter, CollectorRegistry
from ganserve_server.observe.shared_metrics import WorkersMetrics, count_in

def counted():
    return {sample.name + str(sample.labels): sample.value for metric in workers.collect() for sample in metric.samples}

def memory():
    return sum("ganserve-metrics" in line for line in Path("/proc/self/maps").read_text().splitlines()), len(
        os.listdir("/proc/self/fd")
    )

workers, before, used = WorkersMetrics(), {}, set()
for death in range(20):
    with workers.memory_of(0) as descriptor:
        if not (pid := os.fork()):
            count_in(descriptor)
            registry = CollectorRegistry()
            calls = Counter("calls", "Calls.", ["number"], registry=registry)
            while True:
                for number in range(50):
                    calls.labels(number).inc()
                calls = Counter("calls", "Calls.", ["number"], registry=CollectorRegistry())
    until = time.monotonic() + 60
    while sum((now := counted()).values()) < sum(before.values()) + 1 + death and time.monotonic() < until:
        pass
    assert sum(now.values()) > sum(before.values()) or not death, "the worker counts nothing"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    workers.ended(0)
    after = counted()
    assert all(after[name] >= value for name, value in now.items()), "a counter went backwards"
    assert all(now[name] >= value for name, value in before.items()), "a counter went backwards"
    before = after
    used.add(memory())
print(used)
"""


def test_workers_that_are_killed_leave_nothing_and_lose_no_count() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], check=False, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "{(0, 4)}\n"  # no mapping; standard files and the folder that is listed


def test_a_metric_without_memory_is_missing_and_does_no_harm(
    workers: WorkersMetrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = count_as(workers, 0)
    calls = Counter("calls", "Calls.", ["number"], registry=registry)
    calls.labels("first").inc()

    def no_memory(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_memory)
    for number in range(10_000):
        calls.labels(number).inc()
    calls.labels("first").inc()
    found = samples(workers)
    assert found['calls_total{number="first"}'] == 2
    assert 'calls_total{number="9999"}' not in found
    assert [record.msg for record in caplog.records] == ["there is no memory for more metrics; new ones are missing"]
