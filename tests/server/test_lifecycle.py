"""Models that come, change and go while a real server serves."""

import os
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.conftest import WORKERS, RunningServer

from ganserve import Client, ModelNotFoundError
from ganserve.v1 import administration_pb2 as pb
from ganserve.v1 import administration_pb2_grpc as pb_grpc
from ganserve_server.settings import BUNDLED_MODELS

Start = Callable[..., RunningServer]
GOOD = BUNDLED_MODELS / "mlp-mnist" / "1" / "model.onnx"
TRUNCATED = GOOD.read_bytes()[:1000]


def publish(repository: Path, version: int, content: bytes | None = None, name: str = "digits") -> Path:
    """Put a version in its place as `ganserve-trainer export` does: whole or not at all."""
    beside = repository / f".{name}-{version}"
    beside.mkdir(parents=True)
    (beside / "model.onnx").write_bytes(GOOD.read_bytes() if content is None else content)
    folder = repository / name / str(version)
    folder.parent.mkdir(exist_ok=True)
    return beside.rename(folder)


def replace(file: Path, content: bytes) -> None:
    beside = file.with_name(".model")
    beside.write_bytes(content)
    beside.replace(file)


@contextmanager
def constant_load(address: str) -> Iterator[list[int]]:
    """Call without pause from two threads; every call must be answered. Yields the versions that answered."""
    versions: list[int] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def call() -> None:
        with Client(address) as client:
            while not stop.is_set():
                try:
                    versions.append(client.generate("digits", seed=1, count=3).version)
                except BaseException as error:
                    failures.append(error)
                    return

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        yield versions
    finally:
        stop.set()
        for caller in callers:
            caller.join()
    assert not failures
    assert versions


def status(address: str, name: str) -> int:
    with grpc.insecure_channel(address) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name)).status


def loads(metrics_address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{metrics_address}/metrics") as response:
        lines = response.read().decode().splitlines()
    found = [line for line in lines if line.startswith("ganserve_model_loads_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in found}


def test_versions_come_and_go_under_load_with_no_failed_call(start_server: Start, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    server = start_server("--models", tmp_path)
    with constant_load(server.address) as versions, Client(server.address) as client:
        publish(tmp_path, 2)
        assert server.wait_for("model loaded")["version"] == 2
        assert client.generate("digits", seed=1).version == 2
        assert client.generate("digits", seed=1, version=1).version == 1
        shutil.rmtree(tmp_path / "digits" / "2")
        assert server.wait_for("model unloaded")["version"] == 2
        assert client.generate("digits", seed=1).version == 1
        with pytest.raises(ModelNotFoundError, match="no version 2; it has 1"):
            client.generate("digits", seed=1, version=2)
        publish(tmp_path, 3)
        server.wait_for("model loaded")
        client.generate("digits", seed=1)
    assert set(versions) >= {1}
    assert versions[-1] in (1, 3)
    assert loads(server.metrics_address) == {"loaded": 3.0, "unloaded": 1.0}


def test_a_bad_file_stays_out_and_what_was_served_goes_on(start_server: Start, tmp_path: Path) -> None:
    first = publish(tmp_path, 1) / "model.onnx"
    server = start_server("--models", tmp_path)
    with constant_load(server.address) as versions, Client(server.address) as client:
        second = publish(tmp_path, 2, TRUNCATED) / "model.onnx"
        rejected = server.wait_for("model rejected")
        assert rejected["path"].endswith("digits/2/model.onnx")
        assert "truncated" in rejected["reason"]
        replace(first, TRUNCATED)
        assert server.wait_for("model rejected")["path"].endswith("digits/1/model.onnx")
        assert client.generate("digits", seed=1).version == 1
        assert client.model("digits").versions == (1,)
        replace(second, GOOD.read_bytes())
        assert server.wait_for("model loaded")["version"] == 2
        assert client.model("digits").versions == (1, 2)
    assert set(versions) <= {1, 2}
    # Each bad file was tried once, not at every look.
    assert loads(server.metrics_address) == {"loaded": 2.0, "rejected": 2.0}


@pytest.mark.parametrize("workers", WORKERS)
def test_a_misnamed_version_is_told_of_once_each_time_it_comes(
    workers: str, start_server: Start, tmp_path: Path
) -> None:
    publish(tmp_path, 1)
    server = start_server("--models", tmp_path, "--workers", workers)
    misnamed = publish(tmp_path, 2).rename(tmp_path / "digits" / "v2")
    told = server.wait_for("model rejected")
    assert (told["level"], told["path"]) == ("warning", str(misnamed))
    assert "'v2' is not a version" in told["reason"]
    misnamed.rename(tmp_path / "digits" / "2")
    server.wait_for("model loaded")
    misnamed.mkdir()
    shutil.copy(GOOD, misnamed)
    assert server.wait_for("model rejected")["path"] == str(misnamed)
    publish(tmp_path, 3)  # the server looks again, and has nothing to tell
    events = []
    while (event := server.events.get(timeout=60)["event"]) != "stopped":
        events.append(event)
        if event == "model loaded":
            server.process.terminate()
    assert "model rejected" not in events


def test_a_version_that_has_no_file_yet_is_waited_for_in_silence(start_server: Start, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    (tmp_path / "digits" / "2").mkdir()
    server = start_server("--models", tmp_path, "--reload", "off")
    events: list[str] = []

    def look_again(until: str) -> dict[str, object]:
        server.process.send_signal(signal.SIGHUP)
        while (line := server.events.get(timeout=60))["event"] != until:
            events.append(line["event"])
        return line

    (tmp_path / "digits" / "3").mkdir()
    copying = tmp_path / "digits" / "3" / "model.onnx.part"
    copying.write_bytes(TRUNCATED)
    publish(tmp_path, 1, name="other")
    look_again("model loaded")
    copying.write_bytes(GOOD.read_bytes())
    copying.rename(copying.with_name("model.onnx"))
    assert look_again("model loaded")["version"] == 3
    (tmp_path / "digits" / "3" / "model.onnx").unlink()
    assert look_again("model unloaded")["version"] == 3
    assert "model rejected" not in events
    (tmp_path / "digits" / "2" / "generator.onnx").write_bytes(GOOD.read_bytes())
    assert "rename generator.onnx to model.onnx" in str(look_again("model rejected")["reason"])
    with Client(server.address) as client:
        assert client.model("digits").versions == (1,)


def test_a_stream_ends_on_the_version_it_began_on(start_server: Start, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    server = start_server("--models", tmp_path)
    with Client(server.address) as client:
        chunks = client.stream_batches("digits", count=20_000, seed=0)
        first = next(chunks)
        assert first.version == 2
        shutil.rmtree(tmp_path / "digits" / "2")
        server.wait_for("model unloaded")
        rest = list(chunks)
        assert {chunk.version for chunk in rest} == {2}
        assert len(first) + sum(map(len, rest)) == 20_000
        assert client.generate("digits", seed=1).version == 1


def test_so_many_of_the_newest_are_served_as_the_settings_say(start_server: Start, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        publish(tmp_path, version)
    publish(tmp_path, 4, TRUNCATED)
    latest = start_server("--models", tmp_path, "--versions", "latest")
    two = start_server("--models", tmp_path, "--versions", "2")
    with Client(latest.address) as one_of, Client(two.address) as two_of:
        assert one_of.model("digits").versions == (3,)
        assert two_of.model("digits").versions == (2, 3)
        publish(tmp_path, 5)
        for server in (latest, two):
            assert server.wait_for("model loaded")["version"] == 5
            server.wait_for("model unloaded")
        assert one_of.model("digits").versions == (5,)
        assert two_of.model("digits").versions == (3, 5)


def test_sighup_loads_where_nothing_is_watched_and_health_follows(start_server: Start, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 1, name="other")
    server = start_server("--models", tmp_path, "--reload", "off", "--admin-address", "127.0.0.1:0")
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    shutil.rmtree(tmp_path / "other")
    os.kill(server.process.pid, signal.SIGHUP)
    assert server.wait_for("model unloaded")["model"] == "other"
    assert [status(server.address, name) for name in ("", "digits", "other")] == [serving, serving, not_serving]
    with grpc.insecure_channel(server.admin_address) as channel:
        pb_grpc.AdministrationServiceStub(channel).UnloadModel(pb.UnloadModelRequest(model="digits"))
    with Client(server.address) as client:
        with pytest.raises(ModelNotFoundError, match="there are none at all"):
            client.generate("digits", seed=1)
        assert status(server.address, "") == not_serving
        publish(tmp_path, 7, name="other")
        os.kill(server.process.pid, signal.SIGHUP)
        assert server.wait_for("model loaded")["version"] == 7
        assert client.generate("other", seed=1).version == 7
        assert status(server.address, "") == serving
    assert server.stop() == 0


def test_the_memory_of_models_that_are_gone_is_given_back(start_server: Start, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    for number in range(10):
        publish(tmp_path, 1, name=f"other-{number}")
    server = start_server("--models", tmp_path)

    def resident_mib() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) >> 10

    with Client(server.address) as client:
        for number in range(10):
            client.generate(f"other-{number}", count=100, seed=1)
        before = resident_mib()
        for number in range(10):
            shutil.rmtree(tmp_path / f"other-{number}")
        for _ in range(10):
            server.wait_for("model unloaded")
        # Each has its 6 MB of weights in one session or two. A call would have garbage collected.
        deadline = time.monotonic() + 10
        while (after := resident_mib()) > before - 50:
            assert time.monotonic() < deadline, f"{before} MiB before, {after} after"
