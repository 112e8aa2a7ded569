"""A repository as in real life: links that are swapped, folders that cannot be read, files that are being copied."""

import asyncio
import importlib.metadata
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import START_TIMEOUT_S, WORKERS, RunningServer, ordinary_user
from tests.server.test_administration import administration
from tests.server.test_lifecycle import GOOD, publish
from tests.server.test_workers import workers_of

from ganserve import Client
from ganserve.v1 import administration_pb2 as pb
from ganserve_server.observe.metrics import Metrics
from ganserve_server.repository import lifecycle, watching
from ganserve_server.repository.prober import Prober
from ganserve_server.repository.scan import Look, look
from ganserve_server.repository.served import ServedVersions
from ganserve_server.repository.state_folder import StateFolder
from ganserve_server.repository.table import ModelTable
from ganserve_server.repository.watching import Watch
from ganserve_server.settings import ServerSettings

Start = Callable[..., RunningServer]
# Changes are then seen only if the kernel reports them.
NO_POLLING = "--reload-interval-s=86400"
UNREADABLE = "ganserve_repository_unreadable"
NOBODY = 65534  # `ordinary_user`


def lines_until(server: RunningServer, event: str, **facts: object) -> list[dict[str, Any]]:
    """Read the log up to a line with this event and these facts."""
    lines: list[dict[str, Any]] = []
    while not lines or lines[-1]["event"] != event or not facts.items() <= lines[-1].items():
        lines.append(server.events.get(timeout=START_TIMEOUT_S))
    return lines


def events(lines: list[dict[str, Any]]) -> list[str]:
    return [line["event"] for line in lines]


def answering(address: str) -> int:
    """Return the version of `digits` that answers a new connection."""
    with Client(address) as client:
        return client.generate("digits", seed=1).version


def swap(link: Path, target: str) -> None:
    """Set a link to another target at once, as git-sync and Kubernetes do."""
    beside = link.with_name(".next")
    beside.symlink_to(target)
    beside.rename(link)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_link_that_is_swapped_is_followed_and_files_of_the_same_content_are_not_loaded_again(
    workers: str, start_server: Start, tmp_path: Path
) -> None:
    """Below .git, which watchfiles' default filter leaves out."""
    place = tmp_path / ".git" / "x"
    publish(place / "first", 1)
    for version in (1, 2, 3):
        publish(place / "second", version)
    (place / "models").symlink_to("first")
    server = start_server("--models", place / "models", NO_POLLING, "--workers", workers)

    def wait_for_all_workers(version: int) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while {answering(server.address) for _ in range(6)} != {version}:
            assert time.monotonic() < until

    publish(place / "first", 2)
    loaded = lines_until(server, "model loaded", version=2)
    wait_for_all_workers(2)  # from now on, all watch
    swap(place / "models", "second")
    loaded += lines_until(server, "model loaded", version=3)
    wait_for_all_workers(3)
    publish(place / "second", 4)
    loaded += lines_until(server, "model loaded", version=4)
    assert events(loaded) == ["model loading", "model loaded"] * 3


def test_links_inside_the_repository_are_followed(start_server: Start, tmp_path: Path) -> None:
    """A ConfigMap's files are links to ..data, which is a link to a folder."""
    repository, volume = tmp_path / "models", tmp_path / "volume"
    version = repository / "digits" / "1"
    version.mkdir(parents=True)
    for name in ("..1", "..2"):
        (version / name).mkdir()
    shutil.copy(GOOD, version / "..1" / "model.onnx")
    (version / "..2" / "model.onnx").write_text("no model")
    (version / "..data").symlink_to("..1")
    (version / "model.onnx").symlink_to("..data/model.onnx")
    publish(volume, 1, name="elsewhere")
    for number in (1, 2, 3):
        publish(volume, number, name="next")
    (volume / "current").symlink_to("elsewhere")
    (repository / "other").symlink_to(volume / "current")
    server = start_server("--models", repository, NO_POLLING)
    publish(volume, 2, name="elsewhere")
    lines_until(server, "model loaded", model="other", version=2)
    swap(volume / "current", "next")
    lines_until(server, "model loaded", model="other", version=3)
    swap(version / "..data", "..2")
    assert server.wait_for("model rejected")["path"] == str(version / "model.onnx")
    assert answering(server.address) == 1


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_repository_that_vanishes_serves_on_and_is_watched_when_it_is_back(
    left: str, start_server: Start, tmp_path: Path
) -> None:
    repository = tmp_path / "volume" / "models"
    publish(repository, 1)
    server = start_server("--models", repository, NO_POLLING, "--admin-address=127.0.0.1:0")
    if left == "nothing":
        shutil.rmtree(repository.parent)
    else:
        shutil.rmtree(repository / "digits")
    lost = server.wait_for("cannot read the repository")
    assert (lost["level"], lost["path"]) == ("error", str(repository))
    with administration(server) as stub:
        # Not an operator's reload either.
        [state] = stub.ReloadModels(pb.ReloadModelsRequest()).versions
        assert (state.served, state.version) == (True, 1)
        assert f"{repository} cannot be read" in state.reason
    assert answering(server.address) == 1
    assert server.scrape()[UNREADABLE] == 1
    publish(repository, 2)
    server.wait_for("can read the repository again")
    assert server.wait_for("model loaded")["version"] == 2
    assert server.wait_for("model unloaded")["version"] == 1
    assert answering(server.address) == 2
    assert server.scrape()[UNREADABLE] == 0


@pytest.mark.slow  # starts three workers
def test_a_worker_is_replaced_while_the_repository_is_gone(start_server: Start, tmp_path: Path) -> None:
    publish(tmp_path / "models", 1)
    server = start_server("--models", tmp_path / "models", NO_POLLING, "--workers=2")
    (tmp_path / "models").rename(tmp_path / "aside")
    server.wait_for("cannot read the repository")
    shutil.rmtree(tmp_path / "aside")
    os.kill(workers_of(server)[0], signal.SIGKILL)
    server.wait_for("worker started")
    assert {answering(server.address) for _ in range(6)} == {1}


def test_what_cannot_be_read_is_served_on_and_not_loaded_again_when_it_can(start_server: Start, tmp_path: Path) -> None:
    """A link to itself cannot be read, even by root, and neither can a link to what does not exist."""
    repository = tmp_path / "models"
    publish(repository, 1)
    publish(repository, 1, name="other")
    server = start_server("--models", repository, NO_POLLING, "--admin-address=127.0.0.1:0")
    seen: list[dict[str, Any]] = []
    with administration(server) as stub:
        for inside, target in (("", ""), ("1", ""), ("1/model.onnx", ""), ("1", "nowhere")):
            path = repository / "digits" / inside
            path.rename(tmp_path / "aside")
            path.symlink_to(target or path)
            file = path if inside in ("", "1/model.onnx") else path / "model.onnx"
            seen += lines_until(server, "cannot read the repository", path=str(file))
            [digits, other] = stub.ReloadModels(pb.ReloadModelsRequest()).versions
            assert (digits.served, other.served, other.reason) == (True, True, "")
            assert seen[-1]["reason"] in digits.reason
            assert answering(server.address) == 1
            assert server.scrape()[UNREADABLE] == 1
            path.unlink()
            (tmp_path / "aside").rename(path)
            seen += lines_until(server, "can read the repository again")
    assert set(events(seen)) == {"cannot read the repository", "can read the repository again", "admin call"}


async def test_a_file_that_may_not_be_read_is_looked_at_again_once_it_may(open_folder: Path) -> None:
    file = publish(open_folder, 1) / "model.onnx"
    if os.geteuid() == 0:
        os.chown(file, NOBODY, NOBODY)
    seen: asyncio.Queue[Look] = asyncio.Queue()
    stop = asyncio.Event()

    async def look_again() -> float:
        seen.put_nowait(look(open_folder))
        return 86400.0

    with ordinary_user():
        file.chmod(0)
        watch = asyncio.create_task(Watch(open_folder, look_again, 86400).run(stop))
        first = await asyncio.wait_for(seen.get(), START_TIMEOUT_S)
        assert first.unreadable == {("digits", 1): "Permission denied"}
        assert first.unreadable_paths == {file: "Permission denied"}
        file.chmod(0o644)
        second = await asyncio.wait_for(seen.get(), START_TIMEOUT_S)
        assert list(second.found) == [("digits", 1)]
        assert second.unreadable == {}
        stop.set()
        await watch


def test_a_file_that_is_copied_in_place_is_read_once_and_holds_up_no_other(start_server: Start, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    server = start_server("--models", tmp_path)
    other_is_loaded = threading.Event()
    content, part = GOOD.read_bytes(), len(GOOD.read_bytes()) // 40
    (tmp_path / "digits" / "2").mkdir()

    def copy() -> None:
        with (tmp_path / "digits" / "2" / "model.onnx").open("wb") as file:
            for start in range(0, 20 * part, part):
                file.write(content[start : start + part])
                file.flush()
                other_is_loaded.wait(0.1)
            while not other_is_loaded.wait(0.1):
                file.seek(20 * part)
                file.write(content[20 * part : 21 * part])
                file.flush()
            file.seek(20 * part)
            file.write(content[20 * part :])

    copying = threading.Thread(target=copy)
    copying.start()
    try:
        publish(tmp_path, 1, name="other")
        seen = lines_until(server, "model loaded", model="other")
    finally:
        other_is_loaded.set()
        copying.join()
    seen += lines_until(server, "model loaded", model="digits")
    assert events(seen) == ["model loading", "model loaded"] * 2
    assert answering(server.address) == 2


def test_a_model_that_is_removed_and_soon_created_again_is_not_unloaded(start_server: Start, tmp_path: Path) -> None:
    publish(tmp_path, 1)
    other = publish(tmp_path, 1, name="other").parent
    server = start_server("--models", tmp_path, NO_POLLING, "--admin-address=127.0.0.1:0")
    shutil.rmtree(tmp_path / "digits")
    other.rename(tmp_path / ".aside")
    other.symlink_to(other)
    seen = lines_until(server, "cannot read the repository", path=str(other))  # and that `digits` is gone
    publish(tmp_path, 1)
    other.unlink()
    (tmp_path / ".aside").rename(other)
    with administration(server) as stub:
        states = stub.ReloadModels(pb.ReloadModelsRequest()).versions
    assert [(state.served, state.reason) for state in states] == [(True, "")] * 2
    server.process.terminate()
    assert "model unloaded" not in events(seen + lines_until(server, "stopped"))


def test_the_private_class_of_watchfiles_behaves_as_the_watch_needs_it(tmp_path: Path) -> None:
    """The public functions begin to watch only when they wait, so a change during a look would be missed."""
    watchfiles, ended = f"watchfiles {importlib.metadata.version('watchfiles')}", threading.Event()
    try:
        notify = watching._notify({tmp_path: None})
        (tmp_path / "file").touch()
        with notify:
            changes = notify.watch(1600, 100, 0, ended)
            ended.set()
            afterwards = notify.watch(1600, 100, 0, ended)
    except (AttributeError, TypeError, ValueError) as error:
        pytest.fail(f"{watchfiles}: {error}")
    assert {path for _, path in changes} == {str(tmp_path / "file")}, watchfiles
    assert afterwards == "stop", watchfiles


async def test_a_file_system_that_hangs_is_logged_and_looked_at_again_once_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers, threads = threading.Event(), list[threading.Thread]()

    def hang(repository: Path) -> Look:
        threads.append(threading.current_thread())
        answers.wait()
        return look(repository)

    monkeypatch.setattr(lifecycle, "LOOK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(lifecycle, "look", hang)
    settings = ServerSettings(models=tmp_path, state_dir=str(tmp_path), provider="cpu", threads=1)
    models = lifecycle.Lifecycle(settings, StateFolder(settings), Prober(settings))
    models.serve_by(
        ServedVersions(settings, Metrics(), ModelTable(), *[lambda *_: None] * 3, StateFolder(settings).risk())
    )
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            await models.refresh()
        assert len(threads) == 1
        answers.set()
        threads[0].join()
        await models.refresh()
    reasons = [getattr(record, "reason", "") for record in caplog.records]
    assert [record.message for record in caplog.records] == [
        "cannot read the repository",
        "can read the repository again",
    ]
    assert "does not answer within 0.05 s" in reasons[0]
    await models.close()


async def test_no_error_ends_the_watch_and_each_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_watches_left(*_: object, **__: object) -> None:
        raise OSError("OS file watch limit reached")

    monkeypatch.setattr(watching, "RustNotify", no_watches_left)
    looks, stop = 0, asyncio.Event()

    async def look() -> float:
        nonlocal looks
        looks += 1
        if looks == 5:
            stop.set()
        raise ValueError("unexpected")

    with caplog.at_level(logging.ERROR):
        await asyncio.wait_for(watching.Watch(tmp_path, look, 0.01).run(stop), START_TIMEOUT_S)
    assert [record.message for record in caplog.records] == [
        "the kernel does not report changes of the repository",
        "a look at the repository failed",
    ]


def test_odd_links_and_files_hold_up_no_other_model(start_server: Start, tmp_path: Path) -> None:
    """A link to a name that is not UTF-8, names with line feeds, and a file of /proc that is never read to its end."""
    publish(tmp_path, 1)
    server = start_server("--models", tmp_path, "--admin-address=127.0.0.1:0")
    for name in ("dangling", "endless", "line\nfeed"):
        (tmp_path / name).mkdir()
    os.symlink(b"/no/\xff\n", bytes(tmp_path) + b"/dangling/1")
    for name in ("endless", "line\nfeed"):
        (tmp_path / name / "1").mkdir()
        (tmp_path / name / "1" / "model.onnx").symlink_to("/proc/kmsg")
    publish(tmp_path, 1, GOOD.read_bytes() + b"\x82\x01\x00", "later")  # an unknown field of no bytes
    lines_until(server, "model loaded", model="later")
    with administration(server) as stub:
        states = {
            state.model: state.reason for state in stub.ReloadModels(pb.ReloadModelsRequest(), timeout=60).versions
        }
    assert states.keys() == {"dangling", "digits", "endless", "later"}
    assert "leads to /no/?, which does not exist" in states["dangling"]


def test_a_file_that_changes_in_place_without_its_size_and_time_is_loaded(start_server: Start, tmp_path: Path) -> None:
    """As with rsync --inplace from a source whose files all have one time, as reproducible builds make them."""
    content = GOOD.read_bytes()
    file = publish(tmp_path, 1, content + b"\x82\x01\x01a") / "model.onnx"  # an unknown field of one byte
    os.utime(file, (0, 0))
    server = start_server("--models", tmp_path)
    with file.open("r+b") as opened:
        opened.write(content + b"\x82\x01\x01b")
    os.utime(file, (0, 0))
    lines_until(server, "model loaded", model="digits", version=1)
