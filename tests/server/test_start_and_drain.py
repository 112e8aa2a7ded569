"""Start, health, metrics, drain: what an operator sees."""

import asyncio
import contextlib
import datetime
import encodings.idna  # noqa: F401  what an ordinary user may not read of Python
import itertools
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import hpack
import pytest
import trustme
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client import CollectorRegistry
from tests.conftest import START_TIMEOUT_S, WORKERS, RunningServer, ordinary_user
from tests.programs import run

from ganserve import AsyncClient, Client, GanserveError, ImageBatch, UnavailableError
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.observe.http_endpoint import HttpEndpoint
from ganserve_server.processes.systemd import notify
from ganserve_server.settings import BUNDLED_MODELS, ServerSettings
from ganserve_server.start_errors import StartError
from ganserve_server.transport.addresses import bind

Start = Callable[..., RunningServer]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def test_health_is_told_for_the_server_the_service_and_each_model(server: RunningServer, client: Client) -> None:
    names = ["", "ganserve.v1.GenerationService", *(model.name for model in client.models())]
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in names:
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
        with pytest.raises(grpc.RpcError):
            stub.Check(health_pb2.HealthCheckRequest(service="nothing"))


def test_reflection_describes_the_service(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        methods = pool.FindServiceByName("ganserve.v1.GenerationService").methods_by_name
    assert sorted(methods) == ["GenerateEach", "GenerateImages", "GetModel", "ListModels", "StreamImages"]


def test_metrics_count_what_was_done(start_server: Start) -> None:
    running = start_server()
    with Client(running.address) as client:
        client.generate("mlp-mnist", count=100)
        client.generate("cdcgan-mnist", count=3)
        for name in ("nothing", "nothing-else"):
            with pytest.raises(GanserveError):
                client.generate(name)
    samples = running.scrape()
    assert samples['ganserve_images_total{model="mlp-mnist",version="1"}'] == 100
    assert samples['ganserve_batch_size_sum{model="mlp-mnist"}'] == 100
    assert samples['ganserve_batch_size_count{model="mlp-mnist"}'] >= 2
    assert samples['ganserve_requests_total{code="OK",method="GenerateImages",model="cdcgan-mnist",version="1"}'] == 1
    assert samples['ganserve_requests_total{code="NOT_FOUND",method="GenerateImages",model="other",version=""}'] == 2
    assert samples['ganserve_rejections_total{reason="not_found"}'] == 2
    assert samples['ganserve_queue_images{model="mlp-mnist"}'] == 0
    assert not [name for name in samples if "nothing" in name]


def wait_for_sample(running: RunningServer, name: str, wanted: Callable[[float], bool]) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while not wanted(running.scrape().get(name, 0)):
        assert time.monotonic() < until, f"{name} is {running.scrape().get(name)}"


def test_the_versions_that_answer_are_counted_apart_and_others_not_at_all(start_server: Start, tmp_path: Path) -> None:
    for version in ("1", "2"):
        shutil.copytree(BUNDLED_MODELS / "mlp-mnist" / "1", tmp_path / "mlp-mnist" / version)
    running = start_server("--models", tmp_path)
    with Client(running.address) as client:
        for version in (1, 2, 2):
            client.generate("mlp-mnist", version=version)
        client.generate("mlp-mnist")
        client.model("mlp-mnist", version=1)
        with pytest.raises(GanserveError):
            client.generate("mlp-mnist", version=77)
        with pytest.raises(GanserveError):
            client.generate("mlp-mnist", version=1, label=3)
    samples = running.scrape()
    counted = {name: value for name, value in samples.items() if name.startswith("ganserve_requests_total")}
    name = 'ganserve_requests_total{{code="{}",method="{}",model="mlp-mnist",version="{}"}}'
    assert counted == {
        name.format("OK", "GenerateImages", 1): 1,
        name.format("OK", "GenerateImages", 2): 3,
        name.format("OK", "GetModel", 1): 1,
        name.format("NOT_FOUND", "GenerateImages", ""): 1,
        name.format("INVALID_ARGUMENT", "GenerateImages", 1): 1,
    }


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def left_at_once(address: str, *, request: bytes) -> None:
    """Begin a call, send its message if there is one, and leave, all in one packet."""
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/ganserve.v1.GenerationService/GenerateImages"),
        (":authority", address),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, hpack.Encoder().encode(headers))
    if request:
        sent += frame(0, 1, 1, struct.pack(">BI", 0, len(request)) + request)
    sent += frame(3, 0, 1, struct.pack(">I", 8))
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(sent + frame(6, 0, 0, bytes(8)))
        answered = b""
        while frame(6, 1, 0, bytes(8)) not in answered:  # that it is still there says that it has read all
            more = connection.recv(4096)
            assert more, "the server has closed the connection"
            answered += more


def test_callers_that_leave_are_counted_by_what_was_being_done(start_server: Start) -> None:
    running = start_server("--max-images-per-request", "10000")
    name = 'ganserve_cancellations_total{{model="{}",stage="{}"}}'
    left_at_once(running.address, request=b"")
    queued = name.format("mlp-mnist", "queued")
    while not running.scrape().get(queued):  # a busy machine may read the end of the call only after its image is made
        left_at_once(running.address, request=pb.GenerateImagesRequest(model="mlp-mnist", count=1).SerializeToString())
    with grpc.insecure_channel(running.address) as channel:
        request = pb.GenerateImagesRequest(model="cdcgan-mnist", count=3000, encoding=pb.ENCODING_PNG)
        call = pb_grpc.GenerationServiceStub(channel).GenerateImages.future(request)
        wait_for_sample(running, 'ganserve_batch_size_count{model="cdcgan-mnist"}', lambda batches: batches > 0)
        call.cancel()
        wait_for_sample(running, name.format("cdcgan-mnist", "computing"), lambda calls: calls == 1)
    with Client(running.address) as client:
        stream = client.stream_batches("mlp-mnist", count=1_000_000)
        next(stream)
        stream.close()
    wait_for_sample(running, name.format("mlp-mnist", "sending"), lambda calls: calls >= 1)
    counted = {name: value for name, value in running.scrape().items() if "cancellations" in name}
    assert counted == {
        name.format("other", "receiving"): 1,
        queued: 1,
        name.format("cdcgan-mnist", "computing"): 1,
        name.format("mlp-mnist", "sending"): counted[name.format("mlp-mnist", "sending")],
    }


@pytest.mark.parametrize("workers", WORKERS)
def test_connections_and_running_calls_are_told(workers: str, start_server: Start) -> None:
    running = start_server("--workers", workers)
    with Client(running.address) as client, grpc.insecure_channel(running.address) as channel:
        stream = client.stream_batches("mlp-mnist", count=1_000_000)
        next(stream)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        samples = running.scrape()
        assert (samples["ganserve_connections"], samples["ganserve_calls"]) == (2, 2)
        stream.close()
        watch.cancel()
        wait_for_sample(running, "ganserve_calls", lambda calls: calls == 0)
        assert running.scrape()["ganserve_connections"] == 2
    wait_for_sample(running, "ganserve_connections", lambda connections: connections == 0)


def test_sigterm_finishes_what_runs_and_exits_0(start_server: Start) -> None:
    running = start_server("--drain-delay-s", "0")
    with Client(running.address) as client:
        stream = client.stream_batches("cdcgan-mnist", count=20_000, seed=1)
        batches = [next(stream)]
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("draining")
        batches += list(stream)
    assert sum(len(batch) for batch in batches) == 20_000
    assert running.process.wait(timeout=30) == 0
    running.wait_for("stopped")


async def test_sigterm_under_load_ends_no_call_but_with_an_answer_or_unavailable(start_server: Start) -> None:
    running = start_server()
    outcomes: list[str] = []
    loaded = asyncio.Event()

    async def caller(client: AsyncClient) -> None:
        while True:
            try:
                await client.generate("mlp-mnist", seed=1)
            except GanserveError as error:
                outcomes.append(type(error).__name__)
                return
            outcomes.append("ok")
            if len(outcomes) >= 100:
                loaded.set()

    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(running.address)) for _ in range(16)]
        calls = [asyncio.create_task(caller(client)) for client in clients]
        await loaded.wait()
        running.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*calls)
    assert set(outcomes) == {"ok", "UnavailableError"}
    assert await asyncio.to_thread(running.process.wait, 30) == 0


def test_watching_the_health_does_not_hold_up_the_end(start_server: Start) -> None:
    running = start_server("--drain-timeout-s", "3600")
    with grpc.insecure_channel(running.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        assert running.stop() == 0


def test_calls_that_failed_or_were_left_do_not_hold_up_the_end(start_server: Start) -> None:
    running = start_server("--drain-timeout-s", "3600")
    with Client(running.address) as client:
        for call in (
            lambda: client.generate("nothing"),
            lambda: client.generate("mlp-mnist", count=1000, timeout_s=0.001),
        ):
            with pytest.raises(GanserveError):
                call()
        stream = client.stream_batches("cdcgan-mnist", count=1_000_000)
        next(stream)
        stream.close()
        assert running.stop() == 0


def test_the_drain_timeout_cuts_off_what_is_left_and_says_so(start_server: Start) -> None:
    running = start_server("--drain-timeout-s", "0.2")
    with Client(running.address, retries=False) as client:
        stream = client.stream_batches("cdcgan-mnist", count=10_000_000)
        next(stream)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait_for("calls cut off")["calls"] == 1
        with pytest.raises(UnavailableError, match="shut down"):
            list(stream)
    assert running.process.wait(timeout=30) == 0


def test_a_second_signal_ends_the_process_at_once(start_server: Start) -> None:
    running = start_server("--drain-delay-s", "3600")
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("draining")
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(timeout=30) == 128 + signal.SIGINT


def test_sigterm_says_not_serving_and_serves_on_for_the_drain_delay(start_server: Start) -> None:
    running = start_server("--drain-delay-s", "3600")
    with grpc.insecure_channel(running.address) as channel, Client(running.address) as client:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        running.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        assert isinstance(client.generate("mlp-mnist", seed=1), ImageBatch)
        assert running.process.poll() is None
        watch.cancel()


def test_sigterm_when_idle_ends_at_once(start_server: Start) -> None:
    assert start_server().stop() == 0


INTERRUPTED_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "ganserve_server.cli.main":
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                sum(range(1000))
            except BaseException as error:  # as onnxruntime's import does
                raise ImportError("interrupted") from error

sys.meta_path.insert(0, Finder())
from ganserve_server.__main__ import main
main()
"""


def test_sigterm_ends_what_is_still_being_imported() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def failing_start(*flags: str | Path, code: int) -> str:
    common = ("--log-format", "json", "--metrics-address", "off", "--address", "127.0.0.1:0")
    done = run("ganserve-server", *common, *flags)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_taken_address_is_refused(server: RunningServer) -> None:
    assert server.address in failing_start("--address", server.address, code=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        told = json.loads(failing_start("--metrics-address", address, code=1).splitlines()[-1])["reason"]
        assert told.startswith(
            f"cannot listen on {address} (--metrics-address, 'off' for none): Address already in use; "
        )


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("192.0.2.1:50051", "this machine does not have this address; 0.0.0.0 "),
        ("nowhere.invalid:50051", "give an address of this machine"),
        ("127.0.0.1:81", "a port below 1024 needs root"),
    ],
)
def test_an_address_that_cannot_be_listened_on_is_refused_with_a_hint(address: str, told: str) -> None:
    with ordinary_user(), pytest.raises(StartError, match=rf"{address} \(--address\): .*; {told}"):
        bind(address, "--address")


def test_every_address_may_be_a_star(start_server: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    running = start_server("--address", f"*:{port}")
    for host in ("127.0.0.1", "[::1]"):
        with Client(f"{host}:{port}") as client:
            assert len(client.generate("mlp-mnist", count=2)) == 2
    assert running.stop() == 0


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:99999", ":", "127.0.0.1:", "[::1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    assert "HOST:PORT" in failing_start("--address", address, code=1)


def test_a_repository_without_models_is_refused(tmp_path: Path) -> None:
    assert "ganserve-trainer export" in failing_start("--models", tmp_path, code=1)
    assert "does not exist" in failing_start("--models", tmp_path / "nothing", code=1)
    (tmp_path / "file").touch()
    assert "is not a folder" in failing_start("--models", tmp_path / "file", code=1)


def test_a_repository_whose_models_are_all_misplaced_says_so_of_the_first(tmp_path: Path) -> None:
    for place in ("a/v1", "b/v1", "c/v1", "d/1", "e"):
        (tmp_path / place).mkdir(parents=True)
    for file in ("a/v1/model.onnx", "b/v1/model.onnx", "c/v1/model.onnx", "d/1/other.onnx", "e/model.onnx"):
        (tmp_path / file).touch()
    reason = json.loads(failing_start("--models", tmp_path, code=1).splitlines()[-1])["reason"]
    assert f"{tmp_path}/a/v1 ('v1' is not a version" in reason
    assert reason.endswith(", 2 more")
    for place in ("a", "b", "c", "e"):
        shutil.rmtree(tmp_path / place)
    assert "rename other.onnx to model.onnx" in failing_start("--models", tmp_path, code=1)


def test_cuda_that_is_not_there_is_refused() -> None:
    assert "CUDA was requested" in failing_start("--provider", "cuda", code=1)


def test_tensorrt_that_is_not_there_is_refused() -> None:
    assert "TensorRT was requested" in failing_start("--provider", "tensorrt", code=1)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--provider", "tpu"), "cuda"),
        (("--max-batch-size", "0"), "is '0'; it must be a whole number from 1 to 4096"),
        (("--max-batch-size", "many"), "it must be a whole number from 1 to 4096"),
        (("--max-queue-images", "0"), "it must be a whole number, 1 or more"),
        (("--max-model-mib", "2GB"), "it must be a whole number of MiB from 1 to 2048"),
        (("--drain-timeout-s", "30s"), "it must be a number of seconds from 0 to 3600"),
        (("--workers", "0"), "it must be auto, or a whole number from 1 to 999"),
        (("--versions", "newest"), "it must be all, latest, or a whole number from 1 to 999999999"),
        (("--access-log", "some"), "it must be off, errors or all"),
        (("--nonsense",), "No such option"),
    ],
)
def test_a_wrong_flag_says_what_is_allowed(flags: tuple[str, ...], text: str) -> None:
    assert text in failing_start(*flags, code=2)


def test_every_setting_that_is_no_free_text_says_what_it_may_be() -> None:
    free = {name for name in ServerSettings.model_fields if name.endswith(("_file", "address", "_cache", "_dir"))} | {
        "models"
    }
    names = [name for name in ServerSettings.model_fields if name not in free]
    told = failing_start(*(f"--{name.replace('_', '-')}=nonsense" for name in names), code=2)
    reasons = [json.loads(line)["reason"] for line in told.splitlines()]
    assert len(reasons) == len(names) > 10
    assert [reason for reason in reasons if "is 'nonsense'; it must be " not in reason] == []


def test_settings_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch, start_server: Start) -> None:
    monkeypatch.setenv("GANSERVE_SERVER_MAX_IMAGES_PER_STREAM", "5")
    with Client(start_server().address) as client, pytest.raises(GanserveError, match="1 to 5"):
        list(client.stream("mlp-mnist", count=6))
    with Client(start_server("--max-images-per-stream", "7").address) as client:
        assert len(list(client.stream("mlp-mnist", count=7))) == 7


def test_a_flag_goes_before_the_environment_and_that_before_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, start_server: Start
) -> None:
    (file := tmp_path / "server.toml").write_text(
        "max_images_per_stream = 5\nmax_batch_size = 6\nmax_queue_images = 7\naccess_log = 'all'\nworkers = 1"
    )
    monkeypatch.setenv("GANSERVE_SERVER_CONFIG", str(file))
    monkeypatch.setenv("GANSERVE_SERVER_MAX_BATCH_SIZE", "8")
    monkeypatch.setenv("GANSERVE_SERVER_MAX_QUEUE_IMAGES", "9")
    monkeypatch.setenv("GANSERVE_SERVER_SERVICE_PORT_GRPC", "50051")  # Kubernetes tells this of a service of that name
    told = settings_told("--max-queue-images", "10")
    lines = [line for line in told.splitlines() if not line.endswith("# default")]
    assert lines == [
        f'workers = "1"  # {file}',
        "max_batch_size = 8  # GANSERVE_SERVER_MAX_BATCH_SIZE",
        "max_queue_images = 10  # --max-queue-images",
        f"max_images_per_stream = 5  # {file}",
        f'access_log = "all"  # {file}',
    ]
    # What it prints, it reads.
    (again := tmp_path / "again.toml").write_text(told)
    for variable in ("MAX_BATCH_SIZE", "MAX_QUEUE_IMAGES"):
        monkeypatch.delenv(f"GANSERVE_SERVER_{variable}")
    values = [line.partition("  #")[0] for line in told.splitlines()]
    assert [line.partition("  #")[0] for line in settings_told("--config", again).splitlines()] == values
    assert len(values) == len(ServerSettings.model_fields)
    with Client(start_server().address) as client, pytest.raises(GanserveError, match="1 to 5"):
        list(client.stream("mlp-mnist", count=6))


@pytest.mark.parametrize("name", ["\N{GRINNING FACE}", "a\nb", "\x7f", 'a"b\\c'])
def test_settings_of_any_characters_are_told_as_they_are_read(name: str, tmp_path: Path) -> None:
    (file := tmp_path / f"{name}.toml").write_text("max_batch_size = 8\n")
    (again := tmp_path / "again.toml").write_text(settings_told("--config", file, "--models", tmp_path / name))
    read = tomllib.loads(settings_told("--config", again))
    assert (read["models"], read["max_batch_size"]) == (str(tmp_path / name), 8)


def test_paths_in_a_file_are_relative_to_it_and_others_to_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (etc := tmp_path / "etc").mkdir()
    paths = ("models", "tls_certificate_file", "tls_key_file", "tls_client_ca_file", "tokens_file", "tensorrt_cache")
    (etc / "server.toml").write_text("".join(f'{name} = "some/{name}"\n' for name in paths))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GANSERVE_SERVER_TOKENS_FILE", "tokens.toml")
    read = tomllib.loads(settings_told("--config", "etc/server.toml", "--tls-key-file", "tls.key", "--models", "/m"))
    of_others = {"models": "/m", "tls_key_file": f"{tmp_path}/tls.key", "tokens_file": f"{tmp_path}/tokens.toml"}
    assert {name: read[name] for name in paths} == {name: f"{etc}/some/{name}" for name in paths} | of_others
    (etc / "server.toml").write_text('models = "/absolute"\ntls_key_file = ""\n')
    read = tomllib.loads(settings_told("--config", "etc/server.toml"))
    assert (read["models"], read["tls_key_file"]) == ("/absolute", "")


def settings_told(*flags: str | Path) -> str:
    done = run("ganserve-server", *flags, "config")
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("max_batchsize = 5", "'max_batchsize', which is not a setting; did you mean 'max_batch_size'?"),
        ("max_batch_size = 'many'", "max_batch_size in "),
        ("max_batch_size = 0", "is 0; it must be a whole number from 1 to 4096"),
        ("[server]\naddress = ''", "'server', which is not a setting; settings must not be in a table"),
        ("max_batch_size = [1]", "max_batch_size is an array; it must be a number or a text"),
        ("access_log = true", "access_log is a boolean"),
        ("drain_timeout_s = 00:00:30", "drain_timeout_s is a date or a time"),
        ("max_batch_size", "is not TOML"),
        (f"max_batch_size = {'1' * 5000}", "is not TOML"),
        (f"max_batch_size = {'[' * 5000}", "is not TOML"),
        (r'tokens_file = "a\u0000b"', "NUL character"),
        ('models = "s3://bucket/models"', "s3:// URL"),
        (f"max_model_mib = {10**30}", "it must be a whole number of MiB from 1 to 2048"),
    ],
)
def test_a_wrong_file_of_settings_is_told(content: str, text: str, tmp_path: Path) -> None:
    (file := tmp_path / "server.toml").write_text(content)
    assert text in failing_start("--config", file, code=2)


def test_a_url_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--models" in (told := failing_start("--models", "s3://bucket/models", code=2))
    assert "gs:// URL" in failing_start("--tokens-file", "gs://bucket/tokens.toml", code=2)
    assert "s3:// URL" in told
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()  # a path as any other
    assert "a:b has no model" in failing_start("--models", "a:b", code=1)


def test_settings_that_a_transport_does_not_have_are_named() -> None:
    flags = ("--transport", "grpcio", "--body-timeout-s", "4", "--idle-timeout-s", "600")
    done = run("ganserve-server", *flags, "config", "--check")
    assert (done.returncode, done.stdout) == (0, "ok\n")
    assert done.stderr == "ganserve-server: warning: --transport grpcio ignores body_timeout_s\n"
    assert "bounds of --transport own" in failing_start("--transport", "grpcio", "bounds", code=1)


def test_a_file_of_settings_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert "nothing.toml (--config) cannot be read: No such file" in failing_start(
        "--config", tmp_path / "nothing.toml", code=2
    )


def test_an_unknown_variable_of_the_server_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANSERVE_SERVER_MAX_BATCHSIZE", "5")
    # Of another service, whose name begins as the server's.
    monkeypatch.setenv("GANSERVE_SERVER_ADMIN_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("GANSERVE_SERVER_ADMIN_PORT_50052_TCP_ADDR", "10.0.0.1")
    assert "did you mean 'GANSERVE_SERVER_MAX_BATCH_SIZE'?" in failing_start(code=2)


def cannot_start(*flags: str | Path) -> list[str]:
    """Start a server that cannot; return the lines it writes."""
    done = run("ganserve-server", *flags)
    assert done.returncode in (1, 2)
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    "wrong", ["a flag", "a value in the file", "a key in the file", "a variable", "a file's place"]
)
def test_why_a_server_cannot_start_is_told_in_the_format_of_the_log(
    wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether the settings are wrong or what they name: who collects the log reads both."""
    content, flags = "log_format = 'console'\n", ["--config", tmp_path / "server.toml"]
    if wrong == "a flag":
        flags += ["--max-batch-size", "many", "--workers", "no"]
    elif wrong == "a value in the file":
        content += "max_batch_size = 'many'\nworkers = 'no'\n"
    elif wrong == "a key in the file":
        content += "max_batchsize = 5\n"
    elif wrong == "a variable":
        monkeypatch.setenv("GANSERVE_SERVER_MAX_BATCHSIZE", "5")
    else:
        flags += ["--models", tmp_path / "nothing"]
    (tmp_path / "server.toml").write_text(content)
    (line, *more) = cannot_start(*flags)
    assert "cannot start" in line
    assert not line.startswith("{")
    assert len(more) == (wrong in ("a flag", "a value in the file"))
    monkeypatch.setenv("GANSERVE_SERVER_LOG_FORMAT", "json")
    events = [json.loads(line) for line in cannot_start(*flags)]
    assert [(event["event"], event["level"]) for event in events] == [("cannot start", "error")] * (1 + len(more))
    assert all(event["reason"] for event in events)


def test_a_check_of_sound_settings_says_so_while_a_server_runs_with_them(server: RunningServer) -> None:
    """Nothing of it is in the way of a server, and a server not in its own."""
    flags = ("--address", server.address, "--metrics-address", server.metrics_address)
    assert check_told(*flags, code=0) == ["ok"]
    assert check_told("--metrics-address", "off", code=0) == ["ok"]
    assert check_told("--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0", code=0) == ["ok"]


def test_a_check_tells_every_problem_on_a_line(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    models, tls, tokens, port, host, same = check_told(
        *("--models", nothing, "--tls-certificate-file", nothing, "--tls-key-file", nothing, "--tokens-file", nothing),
        *("--address", "0.0.0.0:99999", "--metrics-address", "127.0.0.1:50052", "--admin-address", "[::]:50052"),
        code=1,
    ) + check_told("--address", "192.0.2.1:50051", code=1)
    assert f"{nothing} does not exist" in models
    assert "cannot be read: No such file" in tls
    assert "cannot be used: No such file" in tokens
    assert "HOST:PORT" in port
    assert "--metrics-address 127.0.0.1:50052 and --admin-address [::]:50052 overlap" in host
    assert "cannot listen on 192.0.2.1:50051" in same
    (tmp_path / "empty").mkdir()
    (told,) = check_told("--models", tmp_path / "empty", code=1)
    assert "has no model" in told
    models, port = check_told("--models", tmp_path / ("x" * 300), "--address", f"127.0.0.1:{'9' * 5000}", code=1)
    assert "File name too long" in models
    assert "HOST:PORT" in port


def test_a_check_tells_every_model_file_that_would_be_rejected(tmp_path: Path) -> None:
    for version in ("1", "2", "3"):
        shutil.copytree(BUNDLED_MODELS / "mlp-mnist" / "1", tmp_path / "mlp-mnist" / version)
    whole = (tmp_path / "mlp-mnist/3/model.onnx").read_bytes()
    (tmp_path / "mlp-mnist/1/model.onnx").write_bytes(b"no model")
    (tmp_path / "mlp-mnist/3/model.onnx").write_bytes(whole[:-1000])
    newest, oldest = check_told("--models", tmp_path, code=1)
    assert newest.endswith(
        f"{tmp_path}/mlp-mnist/3/model.onnx would be rejected: the file is not ONNX, or is truncated"
    )
    assert f"{tmp_path}/mlp-mnist/1/model.onnx would be rejected: " in oldest
    assert check_told("--models", tmp_path, "--versions", "latest", code=1) == [newest]
    (tmp_path / "mlp-mnist/3/model.onnx").write_bytes(whole)
    assert check_told("--models", tmp_path, "--versions", "latest", code=0) == ["ok"]
    (tmp_path / "mlp-mnist/1").rename(misnamed := tmp_path / "mlp-mnist/v1")
    (misnamed / "model.onnx").write_bytes(whole)
    (told,) = check_told("--models", tmp_path, code=1)
    assert f"{misnamed} would be rejected: 'v1' is not a version" in told


def test_a_check_tells_a_certificate_that_has_expired(tmp_path: Path) -> None:
    ended = datetime.datetime(2020, 2, 3, 4, 5, tzinfo=datetime.UTC)
    issued = trustme.CA().issue_cert("127.0.0.1", not_before=ended - datetime.timedelta(days=1), not_after=ended)
    issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    issued.private_key_pem.write_to_path(tmp_path / "tls.key")
    (told,) = check_told("--tls-certificate-file", tmp_path / "tls.crt", "--tls-key-file", tmp_path / "tls.key", code=1)
    assert f"{tmp_path / 'tls.crt'} expired on 2020-02-03 at 04:05 UTC" in told


def check_told(*flags: str | Path, code: int) -> list[str]:
    """Check settings; return the lines that are told."""
    done = run("ganserve-server", *flags, "config", "--check")
    assert done.returncode == code, done.stderr
    return (done.stderr + done.stdout).splitlines()


@pytest.mark.parametrize(
    ("kind", "workers"),
    [
        ("path", "1"),
        ("abstract", "2"),
        pytest.param("path", "2", marks=pytest.mark.slow),
        pytest.param("abstract", "1", marks=pytest.mark.slow),
    ],
)
def test_systemd_is_told_when_the_server_is_ready_reloads_and_stops(
    kind: str, workers: str, start_server: Start, monkeypatch: pytest.MonkeyPatch, open_folder: Path
) -> None:
    place = f"@{open_folder}/notify" if kind == "abstract" else f"{open_folder}/notify"
    monkeypatch.setenv("NOTIFY_SOCKET", place)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(START_TIMEOUT_S)
        systemd.bind(place.replace("@", "\0"))
        running = start_server("--workers", workers)
        told = [systemd.recv(4096)]
        running.process.send_signal(signal.SIGHUP)
        told += [systemd.recv(4096), systemd.recv(4096)]
        assert running.stop() == 0
        told.append(systemd.recv(4096))
        systemd.setblocking(False)
        with pytest.raises(BlockingIOError):
            systemd.recv(4096)
    assert [state.partition(b"\n")[0] for state in told] == [b"READY=1", b"RELOADING=1", b"READY=1", b"STOPPING=1"]


@pytest.mark.parametrize("columns", ["120", pytest.param("80", marks=pytest.mark.slow)])
def test_a_paragraph_of_help_is_as_wide_as_the_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for command in (
        [],
        ["config"],
        ["doctor"],
        ["health"],
        ["token"],
        ["token", "add"],
        ["token", "list"],
        ["admin"],
        ["admin", "reload"],
    ):
        told = run("ganserve-server", *command, "--help").stdout
        lines = [line.strip() for line in told.partition("╭")[0].splitlines()]
        for line, following in itertools.pairwise(lines):
            if line and following:  # the next word had no room
                assert len(line) + 1 + len(following.split()[0]) > int(columns) - 2, line


def http_get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}") as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("workers", WORKERS)
def test_probes_are_answered_by_http_too(workers: str, start_server: Start) -> None:
    running = start_server("--workers", workers, "--drain-delay-s", "5")
    assert http_get(running.metrics_address, "/livez") == (200, "ok\n")
    assert http_get(running.metrics_address, "/readyz?verbose") == (200, "ok\n")
    assert http_get(running.metrics_address, "/")[0] == 404
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("draining")
    assert http_get(running.metrics_address, "/readyz") == (503, "draining\n")
    assert http_get(running.metrics_address, "/livez") == (200, "ok\n")
    assert [name for name in running.scrape() if name.startswith('ganserve_provider_info{asked="auto"')]
    assert running.scrape()["ganserve_queue_limit_images"] == 4096 * int(workers)


def test_a_scraper_that_leaves_is_not_logged(start_server: Start) -> None:
    running = start_server()
    host, _, port = running.metrics_address.rpartition(":")
    for _ in range(30):
        with socket.create_connection((host, int(port))) as scraper:
            scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes by a reset
            scraper.send(b"GET /metrics")
    assert http_get(running.metrics_address, "/livez") == (200, "ok\n")
    assert running.stop() == 0
    events = {running.events.get()["event"] for _ in range(running.events.qsize())}
    assert events == {"draining", "stopped"}


def health_told(*flags: str) -> tuple[int, str]:
    done = run("ganserve-server", *flags, "health")
    return done.returncode, (done.stdout + done.stderr).strip()


def test_the_program_itself_tells_whether_a_server_of_its_settings_is_ready(start_server: Start) -> None:
    running = start_server("--drain-delay-s", "10", "--metrics-address", "0.0.0.0:0")
    address = ("--metrics-address", running.metrics_address)
    assert health_told(*address) == (0, "ready")
    running.process.send_signal(signal.SIGTERM)
    running.wait_for("draining")
    assert health_told(*address) == (1, "not ready: draining")
    running.process.kill()
    running.process.wait()
    status, told = health_told(*address)
    assert status == 1
    assert "Connection refused" in told
    assert health_told("--metrics-address", "off")[0] == 2
    assert health_told("--metrics-address", "nowhere:port")[0] == 1
    status, told = health_told("--metrics-address", f"127.0.0.1:{'9' * 30}")
    assert (status, told.count("\n")) == (1, 0)


def test_a_server_that_loads_is_alive_and_not_ready() -> None:
    endpoint = HttpEndpoint("127.0.0.1:0", CollectorRegistry())
    assert endpoint.address is not None
    assert http_get(endpoint.address, "/readyz") == (503, "starting\n")
    assert http_get(endpoint.address, "/livez") == (200, "ok\n")
    endpoint.close()


READY_WHEN_REPORTED = """
import logging, os, signal, urllib.request
from ganserve_server.__main__ import main

def ask(line):
    if line.msg == "serving":
        print(urllib.request.urlopen(f"http://{line.metrics_address}/readyz").status, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
    return True

logging.getLogger("ganserve_server.processes.app").addFilter(ask)
main()
"""


@pytest.mark.parametrize("workers", WORKERS)
def test_a_server_is_ready_before_it_reports_that_it_serves(workers: str) -> None:
    flags = ("--address=127.0.0.1:0", "--metrics-address=127.0.0.1:0", "--workers", workers)
    command = [sys.executable, "-c", READY_WHEN_REPORTED, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_TIMEOUT_S)
    assert (done.returncode, done.stdout) == (0, "200\n"), done.stderr


def ask_for_metrics(address: str, accept: str) -> bytes:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), START_TIMEOUT_S) as peer:
        peer.sendall(f"GET /metrics HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode())
        return b"".join(iter(lambda: peer.recv(1 << 16), b""))


@pytest.mark.parametrize("kind", ["text/plain", "application/openmetrics-text"])
def test_a_scraper_that_asks_for_a_version_that_is_none_gets_the_usual_one(kind: str, start_server: Start) -> None:
    running = start_server()
    assert ask_for_metrics(running.metrics_address, f"{kind}; version=next").startswith(b"HTTP/1.0 200")
    assert running.stop() == 0
    assert running.events.get()["event"] == "draining"


@pytest.fixture
def endpoint() -> Iterator[HttpEndpoint]:
    running = HttpEndpoint("127.0.0.1:0", CollectorRegistry())
    yield running
    running.close()


def test_peers_that_send_byte_by_byte_are_cut_off(endpoint: HttpEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ganserve_server.observe.http_endpoint._MAX_TIMEOUT_S", 0.5)
    assert endpoint.address is not None
    host, _, port = endpoint.address.rpartition(":")
    with socket.create_connection((host, int(port)), START_TIMEOUT_S) as peer:
        peer.settimeout(0.1)
        until = time.monotonic() + 30
        with pytest.raises(OSError, match=r"reset|pipe|closed"):  # noqa: PT012
            while time.monotonic() < until:
                peer.sendall(b"G")
                with contextlib.suppress(TimeoutError):
                    if not peer.recv(1):
                        raise ConnectionResetError("closed")


def test_of_too_many_scrapers_the_oldest_is_closed(endpoint: HttpEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ganserve_server.observe.http_endpoint._MAX_CONNECTIONS", 3)
    assert endpoint.address is not None
    host, _, port = endpoint.address.rpartition(":")
    with contextlib.ExitStack() as peers:
        silent = [peers.enter_context(socket.create_connection((host, int(port)), START_TIMEOUT_S)) for _ in range(3)]
        assert http_get(endpoint.address, "/livez") == (200, "ok\n")
        assert silent[0].recv(1) == b""
        silent[1].sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert silent[1].recv(1) == b"H"


def test_a_systemd_that_reads_nothing_is_not_waited_for(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(open_folder / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", place)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(place)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler, contextlib.suppress(BlockingIOError):
            filler.connect(place)
            filler.setblocking(False)
            while True:
                filler.send(b"X=1")
        notifying = threading.Thread(target=notify, args=("READY=1",), daemon=True)
        notifying.start()
        notifying.join(START_TIMEOUT_S)
        assert not notifying.is_alive()


def calls_logged(running: RunningServer) -> list[dict[str, object]]:
    assert running.stop() == 0
    logged = []
    while (line := running.events.get(timeout=60))["event"] != "stopped":
        if line["event"] == "call":
            logged.append(line)
    return logged


@pytest.mark.parametrize(("flags", "codes"), [(("--access-log", "all"), ["OK", "NOT_FOUND"]), ((), ["NOT_FOUND"])])
def test_calls_are_logged_by_request_id(flags: tuple[str, ...], codes: list[str], start_server: Start) -> None:
    running = start_server(*flags)
    with Client(running.address) as client:
        client.generate("mlp-mnist", seed=1)
        with pytest.raises(GanserveError) as caught:
            client.generate("nothing", seed=1)
    logged = calls_logged(running)
    assert [call["code"] for call in logged] == codes
    assert logged[-1]["request_id"] == caught.value.request_id
    assert "there is no model 'nothing'" in str(logged[-1]["reason"])
    assert logged[-1]["model"] == "other"


def test_a_line_of_the_log_tells_what_a_call_was_and_took(start_server: Start) -> None:
    running = start_server("--access-log", "all")
    with Client(running.address) as client:
        client.generate("mlp-mnist", count=20)
        list(client.stream_batches("mlp-mnist", count=200))
        client.models()
    generated, streamed, listed = calls_logged(running)  # each is a line of JSON, or it would not be found
    for call, method, images in ((generated, "GenerateImages", 20), (streamed, "StreamImages", 200)):
        assert (call["method"], call["model"], call["version"], call["images"]) == (method, "mlp-mnist", 1, images)
        assert 0 < float(str(call["queue_s"])) < float(str(call["seconds"]))
        assert float(str(call["compute_s"])) > 0
        assert call["request_id"]
    assert {"images", "queue_s", "version", "trace_id", "reason"}.isdisjoint(listed)


async def test_failed_calls_do_not_flood_the_log(start_server: Start) -> None:
    running, wanted, seen = start_server(), 2000, Counter[str]()
    async with grpc.aio.insecure_channel(running.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        requests = [pb.GenerateImagesRequest(model="nothing")] * wanted
        requests.append(pb.GenerateImagesRequest(model="mlp-mnist", count=1 << 30))
        started = time.monotonic()
        await asyncio.gather(*(stub.GenerateImages(request) for request in requests), return_exceptions=True)
        seconds = time.monotonic() - started
    lines = not_logged = 0
    while lines + not_logged < wanted:
        line = await asyncio.to_thread(running.events.get, timeout=30)
        if line["event"] == "calls not logged":
            assert line["code"] == "NOT_FOUND"
            not_logged += line["count"]
        else:
            seen[line["code"]] += 1
            lines = seen["NOT_FOUND"]
    assert lines <= 100 * (seconds + 2)
    assert seen["INVALID_ARGUMENT"] == 1  # of another kind


@pytest.mark.parametrize("workers", WORKERS)
def test_calls_that_failed_just_before_the_end_are_counted_in_the_log(workers: str, start_server: Start) -> None:
    running, failed = start_server("--workers", workers), 500
    with grpc.insecure_channel(running.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        calls = [stub.GenerateImages.future(pb.GenerateImagesRequest(model="nothing")) for _ in range(failed)]
        assert {call.code() for call in calls} == {grpc.StatusCode.NOT_FOUND}
    assert running.stop() == 0
    counted = 0
    while counted < failed:
        line = running.events.get(timeout=30)
        counted += line["count"] if line["event"] == "calls not logged" else line["event"] == "call"
    assert counted == failed


def test_no_call_is_logged_where_that_is_turned_off(start_server: Start) -> None:
    running = start_server("--access-log", "off")
    with Client(running.address) as client, pytest.raises(GanserveError):
        client.generate("nothing", seed=1)
    assert calls_logged(running) == []
