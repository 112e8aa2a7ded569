"""Harms replicas by model files, folders, full pipes and stuck processes, and counts the calls of others that fail.

Two replicas run behind Envoy, behind HAProxy, and behind the SDK's own round robin, each with one worker and with two.
Two loads call at the same time (open_loop.py): one by the SDK with its retries, the other one without retries. Where
Triton's client is installed (tritonclient[grpc]), it calls through the proxies as well, without retries.

restart    SIGTERM and a new start of one replica after the other
upgrade    version 2 of the model appears on one replica after the other
rollback   version 2 disappears again
hostile    each file of tests/hostile_models.py is published in turn
large      a model file of 400 MB is published
swapped    the repository is a link, which is swapped to another folder, and back
removed    the repository is removed and made again
unreadable the repository's folder is a link to itself for some seconds, so that it cannot be read
pipe       nobody reads the log of a replica, which is full
temporary  the temporary folder of a replica is a full file system (root)
kill       SIGKILL of a worker; of a replica that has one worker
stop       SIGSTOP of a worker; of a replica that has one worker, and SIGCONT after 10 s

A Prometheus with the rules of deploy/ scrapes both replicas each second. A row for each harm has the alerts that fired,
with the seconds since the harm began, and those that wait for their time (`for`) when it ends.

Bounds: with the SDK's retries, no call fails. Without retries, none fails but in `kill`, where 1 of 1,000 may, and in
`stop`, which has no bound: calls on the connections of a stopped process wait until it is replaced. In both,
the proxies repeat calls that no replica has begun, as in deploy/; otherwise, they repeat nothing. The alerts are those
of `RINGS`, and no others.

    python -m benchmarks.isolation [--only restart,kill,…] [--behind envoy,haproxy,direct] [--workers 1,2] [--check]
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import tritonclient.grpc as triton
import tritonclient.utils as triton_utils
from benchmarks.balancing import (
    BALANCERS,
    DRAIN_DELAY_S,
    MODEL,
    NO_RETRIES,
    PATIENCE_S,
    RETRIES,
    ROOT,
    Host,
    Load,
    Replica,
    Row,
    Site,
    balanced,
    chosen,
    load,
    name_server,
    program,
    row,
    table,
    until,
)
from google.protobuf import json_format
from onnx import helper, numpy_helper
from tests.hostile_models import HOSTILE

from ganserve import Client
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.settings import BUNDLED_MODELS

RATE = 100  # calls a second, of each load
BEFORE_S, AFTER_S = 1.0, 2.0  # calls before and after the harm
HARMED_S = 10.0  # how long a harm lasts that only ends when somebody ends it
LARGE_MIB = 400
FULL_MIB = 1


class Victim(Replica):
    """A replica whose repository can be a link, and whose log is kept or not read at all."""

    def __init__(self, site: Site, number: int, workers: int) -> None:
        super().__init__(site, number)
        self.workers, self.port = workers, site.port
        self.log: list[dict[str, object]] = []
        self.environment: dict[str, str] = {}
        self.reads, self.flags = True, list[str]()

    def start(self, *flags: str) -> None:
        """Start the server, and wait until it serves."""
        settings = (f"--workers={self.workers}", f"--drain-delay-s={DRAIN_DELAY_S:g}", *self.flags, *flags)
        process = subprocess.Popen(
            self.command(*settings),
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment},
        )
        self.process = process
        assert process.stderr is not None
        serving = threading.Event()

        def read() -> None:
            for line in process.stderr or ():
                self.log.append(json.loads(line) if line.startswith("{") else {"event": line})
                if self.log[-1]["event"] == "serving":
                    serving.set()
                    if not self.reads:
                        return
            serving.set()

        threading.Thread(target=read, daemon=True).start()
        if not serving.wait(PATIENCE_S) or process.poll() is not None:
            sys.exit(f"the server does not serve: {self.log}")

    def lines(self, event: str) -> int:
        """Count the log lines of an event."""
        return sum(line["event"] == event for line in list(self.log))

    def worker(self) -> int:
        """Return the process id of a worker, or of the only process."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = [int(pid) for pid in children if b"ganserve_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return found[0] if self.workers > 1 else self.process.pid

    def remove(self, number: int) -> None:
        shutil.rmtree(self.models / MODEL / str(number))

    def serves(self, number: int) -> bool:
        """Return whether the newest version of the model is `number`."""
        with Client(f"{self.host.ip}:{self._site.port}") as client:
            return max(client.model(MODEL).versions) == number

    def ready(self) -> bool:
        url = f"http://{self.host.ip}:{self._site.metrics_port}/readyz"
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def drops_lines(self) -> bool:
        """Return whether the log was not read for so long that lines were dropped."""
        url = f"http://{self.host.ip}:{self._site.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(re.search(rb"^ganserve_log_lines_dropped_total [1-9]", answer.read(), re.MULTILINE))

    @contextmanager
    def as_link(self) -> Iterator[Path]:
        """Make the repository a link to a folder; yield the folder."""
        folder = self.models.with_name(f"{self.models.name}-real")
        self.models.rename(folder)
        self.models.symlink_to(folder)
        try:
            yield folder
        finally:
            self.models.unlink()
            folder.rename(self.models)

    def point_to(self, target: Path) -> None:
        """Swap the repository's link in one step."""
        beside = self.models.with_name("beside")
        beside.symlink_to(target)
        beside.rename(self.models)


class Triton:
    """Calls the Open Inference Protocol through Triton's client, one call after the other, without retries."""

    def __init__(self, address: str) -> None:
        self.calls, self.failures, self._stop = 0, list[str](), threading.Event()
        self._client = triton.InferenceServerClient(address)
        self._seed = triton.InferInput("seed", [1], "UINT32")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.calls += 1
            self._seed.set_data_from_numpy(np.array([self.calls], np.uint32))
            try:
                self._client.infer(MODEL, [self._seed], client_timeout=30)
            except triton_utils.InferenceServerException as error:
                self.failures.append(str(error))
            self._stop.wait(1 / RATE)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()


# The harms. Each gets the replicas and returns a note.


def restart(running: list[Victim]) -> str:
    for one in running:
        one.wait_for_calls()
        one.stop()
        one.start()
        one.wait_for_calls()
    return ""


def upgrade(running: list[Victim]) -> str:
    for one in running:
        one.publish(2)
        until(lambda one=one: one.serves(2), "version 2")  # type: ignore[misc]
    return ""


def rollback(running: list[Victim]) -> str:
    upgrade(running)
    for one in running:
        one.remove(2)
        until(lambda one=one: one.serves(1), "version 1")  # type: ignore[misc]
    return ""


def hostile(running: list[Victim]) -> str:
    found = []
    for name, (content, _) in HOSTILE.items():
        for one in running:
            before = one.lines("model rejected")
            path = one.models / name / "1" / "model.onnx"
            path.parent.mkdir(parents=True)
            path.write_bytes(content())
            until(lambda one=one, before=before: one.lines("model rejected") > before, f"the rejection of {name}")  # type: ignore[misc]
            shutil.rmtree(path.parents[1])
        found.append(name)
    return f"rejected: {', '.join(found)}"


def large(running: list[Victim]) -> str:
    took = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        onnx.save(large_model(LARGE_MIB), path)
        for one in running:
            began = time.monotonic()
            beside = one.models / ".large"
            beside.mkdir()
            shutil.copy(path, beside / "model.onnx")
            (one.models / "large").mkdir()
            beside.rename(one.models / "large" / "1")
            until(lambda one=one: one.lines("model loaded") > 0, "the large model", 120)  # type: ignore[misc]
            took.append(f"{time.monotonic() - began:.1f} s")
    return f"{LARGE_MIB} MiB loaded in {', '.join(took)}"


def swapped(running: list[Victim]) -> str:
    for one in running:
        with one.as_link() as folder:
            other = folder.with_name(f"{folder.name}-2")
            shutil.copytree(folder, other)
            shutil.copytree(BUNDLED_MODELS / MODEL / "1", other / MODEL / "2")
            one.point_to(other)
            until(lambda one=one: one.serves(2), "version 2 by the link", 60)  # type: ignore[misc]
            one.point_to(folder)
            until(lambda one=one: one.serves(1), "version 1 by the link", 60)  # type: ignore[misc]
            shutil.rmtree(other)
    return ""


def removed(running: list[Victim]) -> str:
    for one in running:
        aside = one.models.with_name(f"{one.models.name}-aside")
        one.models.rename(aside)
        time.sleep(HARMED_S)
        aside.rename(one.models)
        one.publish(2)
        until(lambda one=one: one.serves(2), "version 2 in the folder that came back", 60)  # type: ignore[misc]
    return f"each away for {HARMED_S:g} s"


def unreadable(running: list[Victim]) -> str:
    for one in running:
        with one.as_link() as folder:
            one.point_to(one.models)  # a loop: ELOOP
            time.sleep(HARMED_S)
            one.point_to(folder)
    return f"each for {HARMED_S:g} s"


def pipe(running: list[Victim]) -> str:
    one = running[0]
    one.stop()
    one.reads = False
    one.start()
    one.wait_for_calls()
    with grpc.insecure_channel(f"{one.host.ip}:{one.port}") as channel:
        stranger = pb_grpc.GenerationServiceStub(channel)
        end = time.monotonic() + HARMED_S
        while time.monotonic() < end or not (one.drops_lines() or time.monotonic() > end + PATIENCE_S):
            unknown = pb.GenerateImagesRequest(model="unknown-" + "x" * 40)
            for call in [stranger.GenerateImages.future(unknown, timeout=PATIENCE_S) for _ in range(50)]:
                call.exception()
    time.sleep(AFTER_S)  # for Prometheus
    ready = one.ready()
    began = time.monotonic()
    one.stop()
    took = time.monotonic() - began
    one.reads = True
    one.start()
    return f"ready: {ready}; ended {took:.1f} s after SIGTERM"


def temporary(running: list[Victim]) -> str:
    one = running[0]
    folder = one.models.with_name("full")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL_MIB}m", "tmpfs", folder], check=True)
    try:
        one.stop()
        one.environment = {"TMPDIR": str(folder)}
        one.start()
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        one.wait_for_calls()
        time.sleep(HARMED_S / 2)
        deaths = one.lines("a worker ended; it is replaced")
        one.stop()
        one.environment = {}
        one.start()
    finally:
        subprocess.run(["umount", folder], check=True)
    return f"{deaths} workers ended"


def kill(running: list[Victim]) -> str:
    one = running[0]
    os.kill(one.worker(), signal.SIGKILL)
    if one.workers == 1:
        assert one.process is not None
        one.process.wait()
        one.start()
    one.wait_for_calls()
    return ""


def stop(running: list[Victim]) -> str:
    one = running[0]
    pid, began = one.worker(), time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    if one.workers == 1:  # no process is left in this replica that could replace it
        time.sleep(HARMED_S)
        os.kill(pid, signal.SIGCONT)
        return f"for {HARMED_S:g} s"
    until(lambda: one.lines("worker started") > 0, "the replacement of the worker", 60)
    return f"replaced after {time.monotonic() - began:.1f} s"


HARMS: dict[str, Callable[[list[Victim]], str]] = {
    each.__name__: each
    for each in (
        restart,
        upgrade,
        rollback,
        hostile,
        large,
        swapped,
        removed,
        unreadable,
        pipe,
        temporary,
        kill,
        stop,
    )
}
# Calls of 1,000 that may fail if nobody repeats them; all other harms: none.
MAY_FAIL = {kill: 1, stop: 1000}


# The alerts that an operator must get. One that has to last for a minute may be pending when the harm ends.
RINGS: dict[Callable[[list[Victim]], str], set[str]] = {
    hostile: {"GanserveModelRejected", "GanserveModelQuarantined"},
    removed: {"GanserveRepositoryUnreadable"},
    unreadable: {"GanserveRepositoryUnreadable"},
    pipe: {"GanserveLogLinesDropped"},
    stop: {"GanserveEventLoopStandsStill"},
}
STUCK = "GanserveWorkerStuck"  # also rings for `stop` where there is a worker to replace


@dataclass
class Alerted(Row):
    """The alerts of a harm."""

    alerts: str = ""

    def cell(self) -> str:
        return self.alerts or "none"


class Alerts:
    """A Prometheus that scrapes the replicas and judges deploy/'s rules each second."""

    def __init__(self, site: Site) -> None:
        self._address = f"{site.here.ip}:{site.port + 5}"
        folder = site.scratch / "prometheus"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / "deploy" / "prometheus", folder)
        targets = [f"{host.ip}:{site.metrics_port}" for host in site.hosts]
        (folder / "targets/ganserve.yml").write_text(json.dumps([{"targets": targets}]))
        config = folder / "prometheus.yml"
        config.write_text(re.sub(r"(?<=_interval: )15s", "1s", config.read_text()))
        command = [program("prometheus", "apt-get install prometheus"), f"--config.file={config}"]
        command += [f"--web.listen-address={self._address}", f"--storage.tsdb.path={folder / 'data'}"]
        with (site.scratch / "prometheus.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.began = math.inf

    def wait(self) -> None:
        """Wait until both replicas are scraped, and the rules judged; a harm begins."""
        until(lambda: len(self._series('up{job="ganserve"} == 1')) == 2, "Prometheus' first scrapes")
        self.began = time.time()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def since(self) -> tuple[dict[str, float], set[str]]:
        """Return the alerts that fired, each with the seconds since the harm began, and those that are only pending."""
        fired: dict[str, float] = {}
        pending: set[str] = set()
        for series in self._series("ALERTS"):
            name, at_s = series["metric"]["alertname"], series["values"][0][0] - self.began
            if series["metric"]["alertstate"] == "firing":
                fired[name] = min(at_s, fired.get(name, math.inf))
            else:
                pending.add(name)
        return fired, pending - fired.keys()

    def _series(self, query: str) -> list[dict[str, Any]]:
        now = time.time()
        asked = urllib.parse.urlencode({"query": query, "start": min(self.began, now), "end": now, "step": 1})
        with suppress(OSError), urllib.request.urlopen(f"http://{self._address}/api/v1/query_range?{asked}") as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found
        return []


def large_model(mib: int) -> onnx.ModelProto:
    """Build a generator of 8x8 grey pixels with weights of this size."""
    side = 1024
    layers = mib * (1 << 20) // (4 * side * side)
    random = np.random.default_rng(0)
    square = random.standard_normal((side, side)).astype(np.float32) / 32
    names = [f"layer{number}" for number in range(layers)]
    values = ["first", *(f"value{number}" for number in range(layers))]
    weights = {
        "wide": random.standard_normal((16, side)).astype(np.float32) / 4,
        "narrow": random.standard_normal((side, 64)).astype(np.float32) * 60,
        "shape": np.array([-1, 8, 8, 1], np.int64),
        **{name: np.roll(square, number, 0) for number, name in enumerate(names)},
    }
    nodes = [
        helper.make_node("MatMul", ["latent", "wide"], ["first"]),
        *(
            helper.make_node("MatMul", [before, name], [after])
            for before, name, after in zip(values, names, values[1:], strict=False)
        ),
        helper.make_node("MatMul", [values[-1], "narrow"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["pixels"]),
        helper.make_node("Cast", ["pixels"], ["image"], to=onnx.TensorProto.UINT8),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "large",
            [helper.make_tensor_value_info("latent", onnx.TensorProto.FLOAT, ["N", 16])],
            [helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["N", 8, 8, 1])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    card = pb.ModelCard(latent_dim=16, height=8, width=8, channels=1)
    model.metadata_props.add(key="ganserve.model_card", value=json_format.MessageToJson(card))
    return model


def measure(name: str, site: Site, balancer: str, workers: int) -> Iterator[Row]:
    """Yield a row for each load."""
    harm = HARMS[name]
    running = [Victim(site, number, workers) for number in range(2)]
    try:
        for one in running:
            one.flags = ["--load-timeout-s=5"] if harm is hostile else []  # for the files that load for ever
            one.start()
        site.known = [one.host.ip for one in running]
        repeated = RETRIES if harm in MAY_FAIL else NO_RETRIES
        with balanced(balancer, site, repeated) as address, ExitStack() as stack:
            alerts = Alerts(site)
            stack.callback(alerts.close)
            by_sdk = stack.enter_context(load(site, address, f"--rate={RATE}", retries=True))
            alone = stack.enter_context(load(site, address, f"--rate={RATE}"))
            by_triton = Triton(address) if balancer != "direct" else None
            if by_triton:
                stack.callback(by_triton.stop)
            for one in running:
                one.wait_for_calls()
            time.sleep(BEFORE_S)
            alerts.wait()
            note = harm(running)
            time.sleep(AFTER_S)
            rang = alerted(harm, workers, *alerts.since())
            stack.close()
    finally:
        for one in running:
            one.kill()
    title = f"{name}, {workers} worker{'s' * (workers > 1)}"
    for who, done in (("the SDK retries", by_sdk), ("nobody retries", alone)):
        most = _may_fail(harm, done.calls) if done is alone else 0
        yield row(f"{title}, {who}", balancer, done, note, failed=most)
    if by_triton:
        done = Load(alone.process, by_triton.calls, dict(Counter(by_triton.failures)))
        yield row(f"{title}, tritonclient", balancer, done, note, failed=_may_fail(harm, done.calls))
    rang.failure, rang.balancer = f"{title}, alerts", balancer
    yield rang


def alerted(harm: Callable[[list[Victim]], str], workers: int, fired: dict[str, float], pending: set[str]) -> Alerted:
    """Return the row of the alerts of a harm."""
    wanted = RINGS.get(harm, set()) | ({STUCK} if harm is stop and workers > 1 else set())
    told = [f"{name} after {at_s:.0f} s" for name, at_s in sorted(fired.items(), key=lambda item: item[1])]
    made = Alerted("", "", 0, 0, 0.0, alerts=", ".join([*told, *(f"{name} pending" for name in sorted(pending))]))
    if missing := wanted - fired.keys() - pending:
        made.broken = f"no {', '.join(sorted(missing))}"
    elif extra := fired.keys() - wanted:
        made.broken = f"{', '.join(sorted(extra))} should not fire"
    return made


def _may_fail(harm: Callable[[list[Victim]], str], calls: int) -> int:
    return math.ceil(calls / 1000) * MAY_FAIL.get(harm, 0)


def main() -> None:
    """Print a line for each load, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(HARMS))
    parser.add_argument("--behind", default=",".join(BALANCERS))
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is broken")
    parser.add_argument("--port", type=int, default=25600, help="the first of six, on 127.0.0.1 and its neighbours")
    options = parser.parse_args()
    names, balancers = chosen(options.only, tuple(HARMS)), chosen(options.behind, BALANCERS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        hosts = [Host(f"127.0.0.{2 + number}") for number in range(2)]
        site = Site(Host("127.0.0.1"), hosts, options.port, Path(scratch), options.check)
        with name_server(site):
            for name in names:
                for workers in map(int, options.workers.split(",")):
                    for balancer in balancers:
                        for found in measure(name, site, balancer, workers):
                            rows.append(found)
                            print(found.text(), flush=True)
    print(f"\n{table(rows, balancers)}")
    if options.check and any(each.broken for each in rows):
        sys.exit(1)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # also ends the started processes
        main()
