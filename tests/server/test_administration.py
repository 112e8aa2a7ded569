"""Models loaded and unloaded by an operator's calls, in one process and in several."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import tritonclient.grpc as triton
import trustme
from tests.conftest import WORKERS, RunningServer
from tests.programs import installed, run
from tests.server.test_security import CA, write_certificate, write_tokens
from tests.server.test_start_and_drain import http_get
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


def test_loading_says_why_a_version_is_rejected(running: RunningServer, repository: Path) -> None:
    broken = repository / "mlp-mnist" / "2" / "model.onnx"
    broken.parent.mkdir()
    broken.write_bytes(b"no model")
    with administration(running) as stub, Client(running.address) as client:
        first, second = stub.LoadModel(pb.LoadModelRequest(model="mlp-mnist")).versions
        assert (first.served, second.served) == (True, False)
        assert "not ONNX" in second.reason
        assert running.scrape()['ganserve_files_rejected{kind="models"}'] == 1
        assert client.generate("mlp-mnist", seed=1).version == 1
        shutil.rmtree(repository / "mlp-mnist" / "1")
        with pytest.raises(grpc.RpcError) as caught:
            stub.LoadModel(pb.LoadModelRequest(model="mlp-mnist"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "not ONNX" in caught.value.details()
        shutil.rmtree(broken.parent)
        stub.ReloadModels(pb.ReloadModelsRequest())
        assert running.scrape()['ganserve_files_rejected{kind="models"}'] == 0


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
        assert running.wait_for("admin call")["model"] == "\1" * 64 + "…"
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
        assert {state.reason for state in states} == {"an operator unloaded it; LoadModel loads it again"}
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


def admin(*words: str | Path, forked: bool = True, **environment: str) -> tuple[int, str]:
    """Run `ganserve-server`; return its exit status, and what it prints on either stream."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("GANSERVE_")}
    environment = {**known, **environment}
    if forked:
        done = run("ganserve-server", *words, env=environment)
    else:
        command = [installed("ganserve-server"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not (done.stdout and done.stderr)
    return done.returncode, done.stdout + done.stderr


def test_the_command_line_does_what_an_operator_would(running: RunningServer, repository: Path) -> None:
    broken = repository / "mlp-mnist" / "2" / "model.onnx"
    broken.parent.mkdir()
    broken.write_bytes(b"no model")
    shutil.copytree(repository / "mlp-mnist" / "1", repository / "mlp-mnist" / "3")
    address = {"GANSERVE_SERVER_ADMIN_ADDRESS": running.admin_address}
    rest = "mlp-mnist 1 served\nmlp-mnist 2 not served: the file is not ONNX, or is truncated\nmlp-mnist 3 served\n"
    assert admin("admin", "reload", **address) == (0, "cdcgan-mnist 1 served\n" + rest)
    assert admin("--admin-address", running.admin_address, "admin", "unload", "cdcgan-mnist") == (
        0,
        "cdcgan-mnist unloaded\n",
    )
    unloaded = "cdcgan-mnist 1 not served: an operator unloaded it; LoadModel loads it again\n"
    assert admin("admin", "reload", **address) == (0, unloaded + rest)
    assert admin("admin", "load", "cdcgan-mnist", **address) == (0, "cdcgan-mnist 1 served\n")
    for command in ("load", "unload"):
        status, told = admin("admin", command, "nothing", **address)
        assert status == 1
        assert told.startswith(f"ganserve-server: {running.admin_address}: ")
        assert "'nothing'" in told
        assert told.count("\n") == 1


def test_the_command_line_says_in_one_line_whom_it_cannot_ask(server: RunningServer, tmp_path: Path) -> None:
    told = {
        ("--admin-address", "off"): (2, "--admin-address is off"),
        ("--admin-address", "here"): (2, "must be HOST:PORT"),
        ("--admin-address", "127.0.0.1:1"): (1, "127.0.0.1:1: failed to connect"),
        ("--admin-address", server.address): (1, "is it the --admin-address?"),
        ("--admin-address", "127.0.0.1:1", "--tls-certificate-file", tmp_path / "no.crt"): (2, "no.crt: No such file"),
        ("--admin-address", "127.0.0.1:1", "--tls-certificate-file", __file__): (2, "certificates and a key in PEM"),
    }
    for flags, (wanted, text) in told.items():
        status, line = admin(*flags, "admin", "reload")
        assert (status, line.count("\n")) == (wanted, 1), line
        assert text in line
    by_name = ("--admin-address", "images.example.com:1", "admin", "reload")
    assert "plain text" in admin(*by_name, GANSERVE_TOKEN="gs_secret")[1]
    assert "GANSERVE_TOKEN has characters" in admin(*by_name, GANSERVE_TOKEN="gs_secret\n")[1]
    assert "both --certificate-file and --key-file" in admin(*by_name, GANSERVE_KEY_FILE="tls.key")[1]


@pytest.mark.parametrize("workers", WORKERS)
def test_the_command_line_has_a_token_and_takes_the_servers_own_certificate(
    workers: str, start_server: Start, repository: Path, tmp_path: Path
) -> None:
    chain, key = write_certificate(tmp_path / ".tls")
    ops, shop = write_tokens(tmp_path / ".tokens", {"name": "ops", "roles": ["admin"]}, {"name": "shop"})
    tls = ("--tls-certificate-file", chain, "--tls-key-file", key)
    flags = ("--admin-address=127.0.0.1:0", "--tokens-file", tmp_path / ".tokens", "--workers", workers)
    running = start_server(*tls, *flags, "--models", repository)
    address = ("--admin-address", running.admin_address)
    both = (0, "cdcgan-mnist 1 served\nmlp-mnist 1 served\n")
    assert admin(*tls, *address, "admin", "reload", GANSERVE_TOKEN=ops) == both
    for token, text in ((shop, "the role 'admin'"), ("gs_wrong", "does not know the token"), ("", "is needed")):
        status, told = admin(*tls, *address, "admin", "unload", "mlp-mnist", GANSERVE_TOKEN=token)
        assert (status, told.count("\n")) == (1, 1)
        assert text in told
    CA.cert_pem.write_to_path(tmp_path / ".ca")
    assert admin(*address, "admin", "--ca-file", tmp_path / ".ca", "reload", GANSERVE_TOKEN=ops) == both
    trustme.CA().cert_pem.write_to_path(tmp_path / ".other")
    for ca_file, text in ((str(tmp_path / ".other"), "CERTIFICATE_VERIFY_FAILED"), ("", "--ca-file")):
        # Not forked: gRPC reads at its import that it must log nothing.
        words = (*address, "admin", "reload")
        status, told = admin(*words, forked=False, GANSERVE_TOKEN=ops, GANSERVE_CA_FILE=ca_file)
        assert (status, told.count("\n")) == (1, 1)
        assert text in told


def test_the_command_line_shows_a_certificate_and_may_name_the_servers(
    start_server: Start, repository: Path, tmp_path: Path
) -> None:
    chain, key = tmp_path / ".crt", tmp_path / ".key"
    issued = CA.issue_cert("images.example.com")
    issued.cert_chain_pems[0].write_to_path(chain)
    issued.private_key_pem.write_to_path(key)
    CA.cert_pem.write_to_path(tmp_path / ".ca")
    tls = ("--tls-certificate-file", chain, "--tls-key-file", key)
    flags = ("--admin-address=127.0.0.1:0", "--tls-client-ca-file", tmp_path / ".ca")
    running = start_server(*tls, *flags, "--models", repository)
    command = (*tls, "--admin-address", running.admin_address, "admin", "--server-name")
    own = {"GANSERVE_CERTIFICATE_FILE": str(chain), "GANSERVE_KEY_FILE": str(key)}
    assert admin(*command, "images.example.com", "reload", **own)[0] == 0
    assert admin(*command, "images.example.com", "reload")[0] == 1
    assert admin(*command, "127.0.0.1", "reload", **own)[0] == 1
