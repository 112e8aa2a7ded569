"""Models loaded and unloaded by an operator's calls, in one process and in several."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc as triton
from tests.conftest import RunningServer
from tests.server.test_start_and_drain import http_get, scrape
from tests.server.test_workers import Caller, number_of, workers_of

from ganserve import Client, ModelNotFoundError
from ganserve.v1 import administration_pb2 as pb
from ganserve.v1 import administration_pb2_grpc as pb_grpc
from ganserve_server.settings import BUNDLED_MODELS

Start = Callable[..., RunningServer]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("mlp-mnist", "cdcgan-mnist"):
        shutil.copytree(BUNDLED_MODELS / name, tmp_path / name)
    return tmp_path


@pytest.fixture(params=["1", "2"])
def running(request: pytest.FixtureRequest, start_server: Start, repository: Path) -> RunningServer:
    flags = ("--workers", request.param, "--reload", "off", "--admin-address", "127.0.0.1:0")
    return start_server("--models", repository, *flags)


@contextmanager
def administration(running: RunningServer) -> Iterator[pb_grpc.AdministrationServiceStub]:
    with grpc.insecure_channel(running.admin_address) as channel:
        yield pb_grpc.AdministrationServiceStub(channel)


def test_a_model_is_unloaded_and_loaded_again(running: RunningServer) -> None:
    with administration(running) as stub, Client(running.address) as client:
        stub.UnloadModel(pb.UnloadModelRequest(model="mlp-mnist"))
        with pytest.raises(ModelNotFoundError, match="there are cdcgan-mnist"):
            client.generate("mlp-mnist", seed=1)
        # It stays so when the repository is looked at.
        assert [state.model for state in stub.ReloadModels(pb.ReloadModelsRequest()).versions if state.served] == [
            "cdcgan-mnist"
        ]
        [state] = stub.LoadModel(pb.LoadModelRequest(model="mlp-mnist")).versions
        assert (state.version, state.served, state.reason) == (1, True, "")
        assert client.generate("mlp-mnist", seed=1).digest == state.digest


def test_loading_says_why_a_version_is_kept_out(running: RunningServer, repository: Path) -> None:
    broken = repository / "mlp-mnist" / "2" / "model.onnx"
    broken.parent.mkdir()
    broken.write_bytes(b"no model")
    with administration(running) as stub, Client(running.address) as client:
        first, second = stub.LoadModel(pb.LoadModelRequest(model="mlp-mnist")).versions
        assert (first.served, second.served) == (True, False)
        assert "not ONNX" in second.reason
        assert scrape(running)['ganserve_files_kept_out{kind="models"}'] == 1
        assert client.generate("mlp-mnist", seed=1).version == 1
        shutil.rmtree(repository / "mlp-mnist" / "1")
        with pytest.raises(grpc.RpcError) as caught:
            stub.LoadModel(pb.LoadModelRequest(model="mlp-mnist"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "not ONNX" in caught.value.details()
        shutil.rmtree(broken.parent)
        stub.ReloadModels(pb.ReloadModelsRequest())
        assert scrape(running)['ganserve_files_kept_out{kind="models"}'] == 0


def test_reloading_finds_a_new_version(running: RunningServer, repository: Path) -> None:
    shutil.copytree(repository / "mlp-mnist" / "1", repository / "mlp-mnist" / "2")
    with administration(running) as stub, Client(running.address) as client:
        states = stub.ReloadModels(pb.ReloadModelsRequest()).versions
        assert [(state.model, state.version) for state in states] == [
            ("cdcgan-mnist", 1),
            ("mlp-mnist", 1),
            ("mlp-mnist", 2),
        ]
        assert client.generate("mlp-mnist", seed=1).version == 2


@pytest.mark.parametrize("call", ["LoadModel", "UnloadModel"])
def test_a_model_that_is_not_there_is_not_found(call: str, running: RunningServer) -> None:
    with administration(running) as stub, pytest.raises(grpc.RpcError) as caught:
        getattr(stub, call)(getattr(pb, f"{call}Request")(model="nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("call", ["LoadModel", "UnloadModel"])
def test_a_name_of_any_length_is_answered_and_so_is_what_comes_after(call: str, running: RunningServer) -> None:
    with administration(running) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub, call)(getattr(pb, f"{call}Request")(model="\1" * (4_000_000)), timeout=30)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert len(stub.ReloadModels(pb.ReloadModelsRequest(), timeout=30).versions) == 2


def test_of_however_many_versions_all_are_told(running: RunningServer, repository: Path) -> None:
    for number in range(2, 800):
        (repository / "mlp-mnist" / str(number)).mkdir()
    with administration(running) as stub:
        assert len(stub.ReloadModels(pb.ReloadModelsRequest(), timeout=30).versions) == 800


def test_a_worker_that_drains_alone_holds_up_no_operator(start_server: Start, repository: Path) -> None:
    flags = ("--workers=2", "--drain-delay-s=600", "--reload=off", "--admin-address=127.0.0.1:0")
    running = start_server(*flags, "--models", repository)
    os.kill(workers_of(running)[0], signal.SIGTERM)
    serves = True
    while serves:  # those that ask are spread over both
        with Client(running.address) as client:
            serves = client.health()
    with administration(running) as stub:
        assert len(stub.ReloadModels(pb.ReloadModelsRequest(), timeout=30).versions) == 2


def test_tritons_calls_do_the_same(running: RunningServer) -> None:
    operator, caller = triton.InferenceServerClient(running.admin_address), Client(running.address)
    with operator, caller:
        operator.unload_model("mlp-mnist")
        with pytest.raises(ModelNotFoundError):
            caller.generate("mlp-mnist", seed=1)
        operator.load_model("mlp-mnist")
        assert len(caller.generate("mlp-mnist", seed=1)) == 1


def test_the_public_address_does_not_administer(running: RunningServer) -> None:
    with grpc.insecure_channel(running.address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.AdministrationServiceStub(channel).UnloadModel(pb.UnloadModelRequest(model="mlp-mnist"))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_there_is_no_administration_unless_asked_for(server: RunningServer) -> None:
    assert server.admin_address == ""


def test_a_server_whose_models_are_all_unloaded_is_not_ready_and_says_who_did_it(
    running: RunningServer, repository: Path
) -> None:
    with administration(running) as stub:
        for model in sorted(path.name for path in repository.iterdir()):
            assert http_get(running.metrics_address, "/readyz") == (200, "ok\n")
            stub.UnloadModel(pb.UnloadModelRequest(model=model))
        assert http_get(running.metrics_address, "/readyz") == (503, "no model is served\n")
        states = stub.ReloadModels(pb.ReloadModelsRequest()).versions
        assert {state.reason for state in states} == {"it was unloaded by an operator, until LoadModel"}
        stub.LoadModel(pb.LoadModelRequest(model="mlp-mnist"))
        assert http_get(running.metrics_address, "/readyz") == (200, "ok\n")
    assert running.stop() == 0
    events = [running.events.get_nowait() for _ in range(running.events.qsize())]
    told = [event for event in events if event.get("event") == "admin call"]
    assert [event["method"] for event in told][-3:] == ["UnloadModel", "ReloadModels", "LoadModel"]
    assert told[-1]["model"] == "mlp-mnist"
    assert told[-1]["peer"].startswith("127.0.0.1:")


def test_answers_stay_in_step_though_a_caller_left_before_its_own(start_server: Start, repository: Path) -> None:
    running = start_server(
        "--workers=2", "--reload=off", "--models", repository, "--admin-address=127.0.0.1:0", "--access-log=off"
    )
    still = workers_of(running)[0]
    with administration(running) as stub:
        os.kill(still, signal.SIGSTOP)
        with pytest.raises(grpc.RpcError) as caught:
            stub.UnloadModel(pb.UnloadModelRequest(model="mlp-mnist"), timeout=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        os.kill(still, signal.SIGCONT)
        for _ in range(3):
            [state] = stub.LoadModel(pb.LoadModelRequest(model="cdcgan-mnist")).versions
            assert (state.model, state.served) == ("cdcgan-mnist", True)
            states = stub.ReloadModels(pb.ReloadModelsRequest()).versions
            assert [(state.model, state.served) for state in states] == [("cdcgan-mnist", True), ("mlp-mnist", False)]


async def test_a_worker_that_is_just_being_replaced_does_not_miss_what_is_asked(
    start_server: Start, repository: Path
) -> None:
    running = start_server("--workers=2", "--reload=off", "--models", repository, "--admin-address=127.0.0.1:0")
    os.kill(workers_of(running)[0], signal.SIGKILL)
    while len(workers_of(running)) < 2 or None in map(number_of, workers_of(running)):  # noqa: ASYNC110
        await asyncio.sleep(0.001)  # until it starts
    with administration(running) as stub:
        stub.UnloadModel(pb.UnloadModelRequest(model="mlp-mnist"))
        await asyncio.to_thread(running.wait_for, "worker started")
        async with contextlib.AsyncExitStack() as stack:
            callers = [await stack.enter_async_context(Caller(running.address)) for _ in range(4)]
            made = await asyncio.gather(*(caller.make("mlp-mnist", 1, 1) for caller in callers), return_exceptions=True)
        assert [isinstance(one, grpc.aio.AioRpcError) and one.code().name for one in made] == ["NOT_FOUND"] * 4
        assert stub.LoadModel(pb.LoadModelRequest(model="mlp-mnist")).versions[0].served


def test_a_worker_is_replaced_though_all_models_are_unloaded(start_server: Start, repository: Path) -> None:
    running = start_server("--workers=2", "--reload=off", "--models", repository, "--admin-address=127.0.0.1:0")
    with administration(running) as stub, Client(running.address) as client:
        for name in ("mlp-mnist", "cdcgan-mnist"):
            stub.UnloadModel(pb.UnloadModelRequest(model=name))
        os.kill(workers_of(running)[0], signal.SIGKILL)
        running.wait_for("worker started")
        assert http_get(running.metrics_address, "/readyz") == (503, "no model is served\n")
        stub.LoadModel(pb.LoadModelRequest(model="mlp-mnist"))
        assert client.generate("mlp-mnist", seed=1)
        os.kill(workers_of(running)[1], signal.SIGKILL)
        running.wait_for("worker started")
        assert client.models()[0].name == "mlp-mnist"
