"""Model files that crash, hang or exhaust what reads them, in a server that answers calls meanwhile."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.conftest import RunningServer
from tests.hostile_models import HOSTILE, crash_when_opened
from tests.programs import run
from tests.server.test_administration import administration
from tests.server.test_lifecycle import GOOD, publish, replace
from tests.server.test_start_and_drain import http_get, wait_for_sample
from tests.server.test_watchdog import other_callers
from tests.server.test_workers import Caller, workers_of

from ganserve import Client, ModelNotFoundError
from ganserve.v1 import administration_pb2 as pb
from ganserve_server.machine import processes_killed_for_memory
from ganserve_server.observe.metrics import Metrics
from ganserve_server.repository.lifecycle import Lifecycle
from ganserve_server.repository.prober import Prober
from ganserve_server.repository.served import ServedVersions
from ganserve_server.repository.state_folder import StateFolder
from ganserve_server.repository.table import ModelTable
from ganserve_server.settings import BUNDLED_MODELS, ServerSettings

Start = Callable[..., RunningServer]
WITHIN_S = 5  # for a probe; more than a good file takes on a busy machine
QUICK = ("crash-when-opened", "much-memory", "deep-card", "golden-bombs")
CASES = [
    pytest.param("1", QUICK, id="1-several"),
    pytest.param("2", QUICK[:1], marks=pytest.mark.slow, id="2-one"),
    *(
        pytest.param(workers, (name,), marks=pytest.mark.slow, id=f"{workers}-{name}")
        for workers in ("1", "2")
        for name in HOSTILE
    ),
]


@contextmanager
def calls(address: str) -> Iterator[list[int]]:
    """Call again and again; every call must be answered. Yields the versions that answered."""
    with other_callers(address, "digits") as stream:
        yield stream.versions
    assert not stream.errors
    assert stream.versions


def rejections(server: RunningServer, count: int) -> dict[str, str]:
    """Wait for lines about rejected files; return the reason of each, by the model's name."""
    lines = [server.wait_for("model rejected") for _ in range(count)]
    found = {Path(line["path"]).parts[-3]: line["reason"] for line in lines}
    assert len(found) == count, "a file has two lines"
    return found


def check(found: dict[str, str], names: tuple[str, ...]) -> None:
    assert sorted(found) == sorted(names)
    for name in names:
        assert HOSTILE[name][1] in found[name], name


def end(server: RunningServer) -> list[str]:
    """End a server; return the events that were not read."""
    assert http_get(server.metrics_address, "/readyz") == (200, "ok\n")
    assert server.stop() == 0
    server.log_ended.wait(60)
    return [server.events.get_nowait()["event"] for _ in range(server.events.qsize())]


@pytest.mark.parametrize(("workers", "names"), CASES)
def test_a_hostile_file_costs_no_call_and_one_line(
    workers: str, names: tuple[str, ...], start_server: Start, tmp_path: Path
) -> None:
    models, state = tmp_path / "models", tmp_path / "state"
    models.mkdir()
    publish(models, 1)
    flags = ("--models", models, "--workers", workers, "--admin-address=127.0.0.1:0", "--state-dir", state)
    server = start_server(*flags, "--load-timeout-s", str(WITHIN_S))
    with calls(server.address):
        for name in names:
            publish(models, 1, HOSTILE[name][0](), name)
        check(rejections(server, len(names)), names)
        with administration(server) as stub:
            for name in names[:1]:
                with pytest.raises(grpc.RpcError) as caught:
                    stub.LoadModel(pb.LoadModelRequest(model=name), timeout=60)
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert HOSTILE[name][1] in str(caught.value.details())
                check(rejections(server, 1), (name,))
        publish(models, 2)
        assert server.wait_for("model loaded")["version"] == 2
    assert set(end(server)) <= {"admin call", "draining", "stopped"}
    # The next start has them all from the beginning, and does not try again those that ended or outlasted a process.
    server = start_server(*flags, "--load-timeout-s", str(WITHIN_S))
    with Client(server.address) as client:
        assert client.generate("digits", seed=1).version == 2
    quarantined = {"SIGFPE", "--load-timeout-s"}
    expected = sum(HOSTILE[name][1] in quarantined for name in names)
    assert server.scrape()["ganserve_files_quarantined"] == expected
    assert server.scrape()['ganserve_files_rejected{kind="models"}'] == len(names)
    assert not end(server).count("model rejected")


def test_a_load_that_never_ends_holds_up_no_removal_by_an_operator_and_not_the_end(
    start_server: Start, tmp_path: Path
) -> None:
    publish(tmp_path, 1)
    publish(tmp_path, 1, name="other")
    server = start_server("--models", tmp_path, "--admin-address=127.0.0.1:0", "--load-timeout-s=86400")
    publish(tmp_path, 1, HOSTILE["endless-loop"][0](), "endless")
    assert server.wait_for("model loading")["path"].endswith("endless/1/model.onnx")
    with administration(server) as stub:
        stub.UnloadModel(pb.UnloadModelRequest(model="other"), timeout=60)
    with Client(server.address) as client:
        assert [model.name for model in client.models()] == ["digits"]
    assert server.stop() == 0


def test_a_file_with_which_a_worker_crashes_is_quarantined_at_once_and_the_older_version_serves(
    start_server: Start, tmp_path: Path
) -> None:
    models, state = tmp_path / "models", tmp_path / "state"
    models.mkdir()
    publish(models, 1)
    second = publish(models, 2, GOOD.read_bytes() + b"\x82\x01\x00") / "model.onnx"  # an unknown field of no bytes
    server = start_server("--models", models, "--workers=2", "--state-dir", state, "--versions=latest")
    digest = crashed_at(state, server, second)
    quarantined = server.wait_for("model quarantined")
    assert quarantined["path"] == str(second)
    assert "was killed by SIGFPE while it opened the file" in quarantined["reason"]
    server.wait_for("worker started")
    with Client(server.address) as client:
        versions: tuple[int, ...] = ()
        while versions != (1,):
            with contextlib.suppress(ModelNotFoundError):  # before the older version is loaded
                versions = client.model("digits").versions
        assert client.model("digits").digest != digest
    assert server.scrape()["ganserve_files_quarantined"] == 1


def crashed_at(state: Path, server: RunningServer, file: Path) -> str:
    """Have a worker die of SIGFPE as if it opened a file; return the digest of the file."""
    pid = workers_of(server)[0]
    with Client(server.address) as client:
        digest = client.model("digits").digest
    (mark,) = (state / "at-risk").glob(f"{pid}-*")
    facts = {"path": str(file), "size_bytes": file.stat().st_size, "doing": "opened the file"}
    mark.write_text(json.dumps({digest: facts}))
    os.kill(pid, signal.SIGFPE)
    return digest


def test_after_a_kill_during_the_first_batches_a_file_is_quarantined_the_second_time(
    start_server: Start, tmp_path: Path
) -> None:
    models, state = tmp_path / "models", tmp_path / "state"
    models.mkdir()
    publish(models, 1)
    shutil.copytree(GOOD.parents[1].parent / "cdcgan-mnist", models / "other")
    for _ in range(2):
        server = start_server("--models", models, "--state-dir", state)
        with Client(server.address) as client:
            assert {model.name for model in client.models()} == {"digits", "other"}
            digest = client.model("digits").digest
        (mark,) = (state / "at-risk").iterdir()
        facts = {"path": "…", "size_bytes": GOOD.stat().st_size, "doing": "computed one of its first batches"}
        mark.write_text(json.dumps({digest: facts}))
        server.process.kill()
        server.process.wait()
    server = start_server("--models", models, "--state-dir", state, "--admin-address=127.0.0.1:0")
    with Client(server.address) as client, administration(server) as stub:
        assert {model.name for model in client.models()} == {"other"}
        stub.LoadModel(pb.LoadModelRequest(model="digits"), timeout=60)
        assert {model.name for model in client.models()} == {"digits", "other"}
    assert not list((state / "quarantine").iterdir())


def test_a_file_that_was_quarantined_is_loaded_once_it_changes(start_server: Start, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    second = publish(tmp_path, 2, crash_when_opened()) / "model.onnx"
    server = start_server("--models", tmp_path)
    assert server.scrape()["ganserve_files_quarantined"] == 1
    replace(second, GOOD.read_bytes())
    assert server.wait_for("model loaded")["version"] == 2
    wait_for_sample(server, "ganserve_files_quarantined", lambda files: files == 0)


def test_config_check_reports_a_hostile_file_and_ends(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    for name in ("crash-when-opened", "endless-loop"):
        publish(tmp_path, 1, HOSTILE[name][0](), name)
    done: Any = run("ganserve-server", "--models", tmp_path, "--load-timeout-s=3", "config", "--check")
    assert done.returncode == 1
    assert [name in done.stderr for name in ("SIGFPE", "--load-timeout-s", "digits")] == [True, True, False]


async def test_a_version_that_is_withdrawn_waits_for_an_operator_and_is_at_risk_during_its_first_batches(
    tmp_path: Path,
) -> None:
    models, state = tmp_path / "models", tmp_path / "state"
    models.mkdir()
    publish(models, 1)
    settings = ServerSettings(models=models, state_dir=str(state), provider="cpu", threads=1)
    folder, table, reports = StateFolder(settings), ModelTable(), list[tuple[str, int, str, str]]()
    lifecycle = Lifecycle(settings, folder, Prober(settings))
    versions = ServedVersions(
        settings,
        Metrics(),
        table,
        lambda *_: None,
        lambda *report: reports.append(report),
        lambda _: None,
        folder.risk(),
    )
    lifecycle.serve_by(versions)
    await lifecycle.start()
    (at_risk,) = (state / "at-risk").iterdir()
    batcher = table.find("digits", None)
    model = batcher.model
    tried = 0
    while (trial := model.engine.trial) is not None:
        with trial():
            assert model.digest in at_risk.read_text()
        assert at_risk.read_text() == "{}"
        tried += 1
    assert tried == 8
    versions.withdraw(batcher, "its batches do not end")
    assert table.names == []
    assert reports == [("digits", 1, model.digest, "its batches do not end")]
    await lifecycle.withdraw(*reports[0])
    [found] = await lifecycle.reload()
    assert "its batches do not end" in found.reason
    assert not found.served
    [found] = await lifecycle.load("digits")
    assert found.served
    await lifecycle.close()
    await versions.close()
    assert not at_risk.exists()


async def test_a_small_model_is_checked_where_little_memory_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if files may be larger than the memory that is left, as in a container of 512 MiB."""
    monkeypatch.setattr("ganserve_server.repository.prober.memory_left", lambda: 128 << 20)
    prober = Prober(ServerSettings(provider="cpu", threads=2))
    assert (await prober.probe(BUNDLED_MODELS / "cdcgan-mnist" / "1" / "model.onnx")).outcome == "passed"
    await prober.close()


@pytest.mark.skipif(processes_killed_for_memory() is None, reason="the kernel does not count kills for memory")
async def test_a_probe_that_somebody_kills_or_stops_says_nothing_about_its_file(tmp_path: Path) -> None:
    file = publish(tmp_path, 1, HOSTILE["endless-loop"][0]()) / "model.onnx"
    prober = Prober(ServerSettings(provider="cpu", threads=1, load_timeout_s=2))
    for number, how in ((signal.SIGKILL, "killed"), (signal.SIGSTOP, "stopped")):
        assert (await prober.probe(GOOD)).outcome == "passed"  # it has started
        probing = asyncio.create_task(prober.probe(file))
        await asyncio.sleep(0)  # the request is sent
        os.kill(probe_of(os.getpid()), number)
        found = await probing
        assert found.outcome == "unreadable"
        assert how in found.reason


def probe_of(pid: int) -> int:
    """Return the process id of the probe of a server."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    probe = b"ganserve_server.repository.probe"
    (found,) = (int(child) for child in children if probe in Path(f"/proc/{child}/cmdline").read_bytes())
    return found


@pytest.mark.parametrize("harm", ["full", "removed"])
def test_a_file_is_quarantined_though_the_state_folder_is_full_or_was_removed(harm: str, tmp_path: Path) -> None:
    settings = ServerSettings(models=tmp_path, state_dir=str(tmp_path / "state"))
    folder = StateFolder(settings)
    shutil.rmtree(tmp_path / "state" / "quarantine")
    if harm == "full":
        (tmp_path / "state" / "quarantine").write_text("no folder, so that nothing can be written in it")
    folder.quarantine("sha256:1", 10, "…", "a process was killed by SIGFPE")
    assert folder.quarantined("sha256:1")
    assert folder.marked_sizes() == {10}
    assert bool(StateFolder(settings).quarantined("sha256:1")) == (harm == "removed")
    folder.release("sha256:1")
    assert not folder.quarantined("sha256:1")


async def test_folders_of_probes_whose_server_was_killed_are_removed_by_the_next_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left_behind, of_another_server = tmp_path / "ganserve-probe-left", tmp_path / "ganserve-probe-used"
    for folder in (left_behind, of_another_server):
        folder.mkdir()
        (folder / "profile.json").touch()
    lock = os.open(of_another_server, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    prober = Prober(ServerSettings(provider="cpu", threads=1))
    await prober.probe(tmp_path / "no-model.onnx")
    own = set(os.listdir(tmp_path)) - {of_another_server.name}
    assert len(own) == 1
    assert left_behind.name not in own
    await prober.close()
    assert os.listdir(tmp_path) == [of_another_server.name]
    os.close(lock)


async def test_a_model_is_opened_only_if_its_memory_is_left_and_tried_again_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    publish(models, 1)
    publish(models, 1, name="other")
    settings = ServerSettings(models=models, state_dir=str(tmp_path / "state"), provider="cpu", threads=1)
    folder = StateFolder(settings)
    lifecycle, table = Lifecycle(settings, folder, Prober(settings)), ModelTable()
    versions = ServedVersions(settings, Metrics(), table, *[lambda *_: None] * 3, folder.risk())
    lifecycle.serve_by(versions)
    await lifecycle.start()
    for left_mib, served in ((1, False), (1, False), (1024, True)):
        publish(models, 2) if not (models / "digits" / "2").exists() else None
        monkeypatch.setattr("ganserve_server.repository.lifecycle.memory_left", lambda left=left_mib << 20: left)
        found = next(state for state in await lifecycle.reload() if (state.model, state.version) == ("digits", 2))
        assert found.served == served
        assert ("and 1 MiB are left" in found.reason) != served
    await lifecycle.close()
    await versions.close()


async def test_a_worker_that_replaces_another_serves_the_same_versions_though_a_file_was_replaced(
    start_server: Start, tmp_path: Path
) -> None:
    publish(tmp_path, 1)
    second = publish(tmp_path, 2) / "model.onnx"
    server = start_server("--models", tmp_path, "--workers=2")
    replace(second, b"no model")
    assert server.wait_for("model rejected")["path"] == str(second)
    os.kill(workers_of(server)[0], signal.SIGKILL)
    server.wait_for("worker started")
    async with contextlib.AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(Caller(server.address)) for _ in range(4)]
        assert {await caller.version("digits") for caller in callers} == {2}
