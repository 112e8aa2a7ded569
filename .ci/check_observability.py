"""Ask a real Prometheus every query of the dashboard and the rules, while it scrapes servers under load of all kinds.

Then kill a replica, see the alert in Alertmanager, start it again, and see the alert go.
"""

import contextlib
import http.server
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import trustme

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.settings import BUNDLED_MODELS

DEPLOY = Path("deploy")
PROGRAM = Path(sys.executable).with_name("ganserve-server")
LIMIT_S = 60.0
OK, INTERNAL = grpc.StatusCode.OK, grpc.StatusCode.INTERNAL
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
# What NVIDIA's exporter would answer, for want of a GPU.
DCGM_SAMPLE = Path(".ci/dcgm-exporter.txt")
# Asked for their syntax alone: they find servers that leave a GPU unused which is there, or was asked for.
WITHOUT_DATA = {
    'ganserve_provider_info{asked="auto",gpu="1",running="CPUExecutionProvider"}',
    'ganserve_provider_info{asked=~"cuda|tensorrt",running="CPUExecutionProvider"}',
}
# May fire, since "for" is a second here: the flood fills the queues, and a busy machine may miss a scrape.
OF_LOAD = {
    "GanserveSettingsRejected",  # fixed just before
    "GanserveCallerLimited",
    "GanserveCallersUnknown",
    "GanserveErrorBudgetBurnsSlowly",  # until Alertmanager has the other, which silences it
    "GanserveLatencyHigh",
    "GanserveQueueNearlyFull",
    "GanserveQueueSlow",
    "GanserveReplicaDown",
    "GanserveSaturated",
    "GanserveTlsFailing",
}
_SELECTOR = re.compile(r"(?<![\w:\"])((?:ganserve|process|job|job_model|job_instance_model)[_:][\w:]+|up)(\{[^}]*\})?")


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"ok {title} ({time.perf_counter() - started:.1f} s)", flush=True)


def wait_until(what: str, true: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """Poll until `true` returns something true, and return it."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if found := true():
                return found
        time.sleep(0.2)
    sys.exit(f"FAILED: {what}: not so after {limit_s:g} s")


def free_address() -> str:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{bound.getsockname()[1]}"


@contextlib.contextmanager
def running(log: Path, *command: object) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as file, subprocess.Popen([str(word) for word in command], stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def replica(models: Path, metrics_address: str, log: Path, *flags: str) -> Iterator[tuple[Any, str]]:
    """Start a server; yield its process and where it answers gRPC."""
    addresses = ("--address=127.0.0.1:0", f"--metrics-address={metrics_address}", "--log-format=json")
    log.unlink(missing_ok=True)
    with running(log, PROGRAM, *addresses, f"--models={models}", *flags) as process:

        def told() -> str | None:
            if process.poll() is not None:
                sys.exit(f"FAILED: a server ended: {log.read_text()}")
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
            return next((line["address"] for line in lines if line["event"] == "serving"), None)

        try:
            yield process, wait_until("a server serves", told)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(30)


class Load:
    """Calls of all kinds at some servers, until it is closed."""

    def __init__(self, channels: list[tuple[str, Callable[[], grpc.Channel]]]) -> None:
        self._end = threading.Event()
        self.codes: set[grpc.StatusCode] = set()  # that the fragile model's callers saw
        kinds = (self._ordinary, self._wrong, self._leaving, self._flood, self._failing)
        self._threads = [
            threading.Thread(target=self._repeat, args=(channel, calls), name=f"{calls.__name__}, {name}")
            for name, channel in channels
            for calls in kinds
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End it; see that it went on until now."""
        ended = [thread.name for thread in self._threads if not thread.is_alive()]
        self._end.set()
        for thread in self._threads:
            thread.join()
        if ended:
            sys.exit(f"FAILED: a part of the load ended early: {ended}")

    def _repeat(
        self, connect: Callable[[], grpc.Channel], calls: Callable[[pb_grpc.GenerationServiceStub], None]
    ) -> None:
        with connect() as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            while not self._end.wait(0.1):
                with contextlib.suppress(grpc.RpcError):  # a killed server's
                    calls(stub)

    @staticmethod
    def _ordinary(stub: pb_grpc.GenerationServiceStub) -> None:
        encodings = (pb.ENCODING_RAW, pb.ENCODING_PNG, pb.ENCODING_JPEG, pb.ENCODING_WEBP)
        stub.ListModels(pb.ListModelsRequest())
        for model in ("cdcgan-mnist", "mlp-mnist"):
            stub.GetModel(pb.GetModelRequest(model=model))
            for encoding in encodings:
                stub.GenerateImages(pb.GenerateImagesRequest(model=model, count=4, encoding=encoding))
            generate = pb.GenerateImagesRequest(model=model, count=64)
            list(stub.StreamImages(pb.StreamImagesRequest(generate=generate)))
            list(stub.GenerateEach(iter([pb.GenerateEachRequest(generate=generate)] * 4)))

    @staticmethod
    def _wrong(stub: pb_grpc.GenerationServiceStub) -> None:
        for request in (
            pb.GenerateImagesRequest(model="cdcgan-mnist", count=10**6),
            pb.GenerateImagesRequest(model="cdcgan-mnist", label_names=["eleven"]),
            pb.GenerateImagesRequest(model="nobody"),
        ):
            with contextlib.suppress(grpc.RpcError):
                stub.GenerateImages(request)

    @staticmethod
    def _leaving(stub: pb_grpc.GenerationServiceStub) -> None:
        request = pb.GenerateImagesRequest(model="dcgan-mnist", count=10_000)
        stream = stub.StreamImages(pb.StreamImagesRequest(generate=request))
        next(stream)
        stream.cancel()

    @staticmethod
    def _flood(stub: pb_grpc.GenerationServiceStub) -> None:
        """Ask for more than may wait, and for some of it too soon."""
        request = pb.GenerateImagesRequest(model="dcgan-mnist", count=512)
        calls = [stub.GenerateImages.future(request, timeout=0.05 if number % 4 else 5.0) for number in range(12)]
        for call in calls:
            with contextlib.suppress(grpc.RpcError):
                call.result()

    def _failing(self, stub: pb_grpc.GenerationServiceStub) -> None:
        """Ask the fragile model for what it can make, then for what its engine fails at: all of that batch."""
        sound = pb.GenerateImagesRequest(model="fragile", count=4)
        self.codes.add(stub.GenerateImages.with_call(sound)[1].code())
        large = pb.GenerateImagesRequest(model="fragile", latents=pb.Latents(values=[1000.0] * 100))
        self.codes.update(call.code() for call in [stub.GenerateImages.future(large) for _ in range(4)])


class Guarded:
    """Certificates and tokens, and channels that have them or not."""

    def __init__(self, folder: Path) -> None:
        self._tokens = folder / "tokens.toml"
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        certificate.cert_chain_pems[0].write_to_path(folder / "tls.crt")
        certificate.private_key_pem.write_to_path(folder / "tls.key")
        self._authority = authority.cert_pem.bytes()
        self._token = self.add("caller")
        self.slow_token = self.add("slow", "--images-per-s=20")
        self.flags = (
            f"--tls-certificate-file={folder / 'tls.crt'}",
            f"--tls-key-file={folder / 'tls.key'}",
            f"--tokens-file={self._tokens}",
            "--max-connection-age-s=3",
        )

    def add(self, name: str, *flags: str) -> str:
        """Add a token, and return it."""
        command = [PROGRAM, "token", "add", name, f"--file={self._tokens}", *flags]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        """Have tokens that cannot be read."""
        right = self._tokens.read_text()
        self._tokens.write_text("no TOML")
        yield
        self._tokens.write_text(right)

    def channel(self, address: str, token: str = "") -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(self._authority)
        caller = grpc.access_token_call_credentials(token or self._token)
        return grpc.secure_channel(address, grpc.composite_channel_credentials(credentials, caller), OPTIONS)


class Prometheus:
    """Asks a Prometheus."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url) as response:
            return json.load(response)["data"]

    def ask(self, query: str) -> list[Any]:
        """Return the values that are numbers."""
        try:
            found = self.get("query", query=query)["result"]
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.SERVICE_UNAVAILABLE:  # it starts
                return []
            sys.exit(f"FAILED: Prometheus does not take the query {query}\n{error.read().decode()}")
        return [one for one in found if one["value"][1] != "NaN"]


def publish_fragile(models: Path) -> None:
    """Publish a mlp-mnist that looks each latent up in a table: it fails for one that is larger than any normal one."""
    model = onnx.load(BUNDLED_MODELS / "mlp-mnist/1/model.onnx")
    graph, table, axes = model.graph, np.zeros(100, np.float32), np.array([1])
    for node in graph.node:
        node.input[:] = ["looked_up" if name == "latent" else name for name in node.input]
    for name, values in (("table", table), ("axes", axes)):
        graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for place, (kind, inputs, output, more) in enumerate(
        (
            ("Abs", ["latent"], "sizes", {}),
            ("ReduceMax", ["sizes", "axes"], "largest", {}),
            ("Cast", ["largest"], "index", {"to": onnx.TensorProto.INT64}),
            ("Gather", ["table", "index"], "zero", {}),
            ("Add", ["latent", "zero"], "looked_up", {}),
        )
    ):
        graph.node.insert(place, onnx.helper.make_node(kind, inputs, [output], **more))
    (models / "fragile/1").mkdir(parents=True)
    onnx.save(model, models / "fragile/1/model.onnx")


def configure(scratch: Path, replicas: list[str], alertmanager: str, exporter: str) -> None:
    """Copy Prometheus' files, with our addresses, a second where they say minutes, and nothing else changed."""
    shutil.copytree(DEPLOY / "prometheus", scratch / "prometheus")
    for name, targets in (("ganserve", replicas), ("alertmanager", [alertmanager]), ("dcgm", [exporter])):
        (scratch / f"prometheus/targets/{name}.yml").write_text(json.dumps([{"targets": targets}]))
    for name, pattern in (("prometheus.yml", r"(?<=_interval: )15s"), ("rules.yml", r"(?<= for: )\d+m")):
        file = scratch / "prometheus" / name
        changed, count = re.subn(pattern, "1s", file.read_text())
        assert count
        file.write_text(changed)


@contextlib.contextmanager
def answering(page: str) -> Iterator[str]:
    """Answer a page to whoever asks; yield the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(http.HTTPStatus.OK)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def dashboard_queries() -> dict[str, set[str]]:
    """Return the labels that the legend of each query names."""
    panels = json.loads((DEPLOY / "grafana/dashboards/ganserve.json").read_text())["panels"]
    values = {"$__rate_interval": "30s", "$job": "ganserve", "$instance": ".*", "$model": ".*"}
    queries: dict[str, set[str]] = {}
    for target in (target for panel in panels for target in panel.get("targets", [])):
        query = target["expr"]
        for name, value in values.items():
            query = query.replace(name, value)
        queries.setdefault(query, set()).update(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    if left := [query for query in queries if "$" in query]:
        sys.exit(f"FAILED: variables that nobody set: {left}")
    return queries


def rule_queries(prometheus: Prometheus) -> list[str]:
    """Return what the rules record, and each selector of an alert: alerts themselves have no data while all is well."""
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    recorded = [rule["query"] for rule in rules if rule["type"] == "recording"]
    alerts = [rule["query"] for rule in rules if rule["type"] == "alerting"]
    selectors = {match[0] for query in [*recorded, *alerts] for match in _SELECTOR.finditer(query)}
    return [*recorded, *sorted(selectors)]


def runbook_queries() -> list[str]:
    """Return what the pages ask Prometheus, in blocks and within sentences."""
    queries = []
    for page in sorted(Path("docs/operations").glob("*.md")):
        text = page.read_text()
        queries += re.findall(r"^ *ask '([^']+)'", text, re.MULTILINE)
        codes = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        queries += [" ".join(code.split()) for code in codes if _SELECTOR.search(code) and set(code) & set("({")]
    return queries


def firing(alertmanager: str) -> set[tuple[str, str]]:
    """Ask Alertmanager, by amtool, for the alerts: name and replica."""
    command = ["amtool", f"--alertmanager.url=http://{alertmanager}", "alert", "query", "--output=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    labels = [alert["labels"] for alert in json.loads(done.stdout or "[]")] if not done.returncode else []
    return {(label["alertname"], label.get("instance", "")) for label in labels}


def main() -> None:
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        models = scratch / "models"
        shutil.copytree(BUNDLED_MODELS, models)
        (models / "broken/1").mkdir(parents=True)
        (models / "broken/1/model.onnx").write_bytes(b"no model")
        publish_fragile(models)
        addresses = [free_address(), free_address()]
        prometheus, alertmanager = free_address(), free_address()
        configure(scratch, addresses, alertmanager, stack.enter_context(answering(DCGM_SAMPLE.read_text())))
        flags = ["--max-queue-images=2048"]
        (scratch / "guarded").mkdir()
        guarded = Guarded(scratch / "guarded")

        with step("two replicas, Prometheus and Alertmanager start"):
            first = contextlib.ExitStack()
            stack.enter_context(first)
            process, address = first.enter_context(
                replica(models, addresses[0], scratch / "a.log", *flags, *guarded.flags)
            )
            _, other = stack.enter_context(replica(models, addresses[1], scratch / "b.log", "--workers=2", *flags))
            command = ["prometheus-alertmanager", f"--config.file={DEPLOY / 'alertmanager.yml'}"]
            listen = [f"--web.listen-address={alertmanager}", "--cluster.listen-address="]
            stack.enter_context(running(scratch / "am.log", *command, *listen, f"--storage.path={scratch / 'am'}"))
            command = ["prometheus", f"--config.file={scratch / 'prometheus/prometheus.yml'}"]
            listen = [f"--web.listen-address={prometheus}", f"--storage.tsdb.path={scratch / 'tsdb'}"]
            stack.enter_context(running(scratch / "prometheus.log", *command, *listen))
            load = Load(
                [
                    ("with TLS", lambda: guarded.channel(address)),
                    ("with a low rate", lambda: guarded.channel(address, guarded.slow_token)),
                    ("without a valid token", lambda: guarded.channel(address, "gs_nobody")),
                    ("in plain text where there is TLS", lambda: grpc.insecure_channel(address, OPTIONS)),
                    ("in plain text", lambda: grpc.insecure_channel(other, OPTIONS)),
                ]
            )
            stack.callback(load.close)
            asked = Prometheus(prometheus)
            wait_until("Prometheus scrapes both", lambda: len(asked.ask('up{job="ganserve"} == 1')) == 2)

        shutil.rmtree(models / "cdcgan-fashion-mnist")  # so that a version is unloaded
        guarded.add("another")
        reloads = "ganserve_file_reloads_total"
        wait_until("a changed file is read again", lambda: asked.ask(f'{reloads}{{outcome="loaded"}}'))
        with guarded.broken():
            wait_until("a wrong file is rejected", lambda: asked.ask(f'{reloads}{{outcome="rejected"}}'))
            rejected = ("GanserveSettingsRejected", addresses[0])
            wait_until("it is an alert", lambda: rejected in firing(alertmanager))

        wait_until("the rules are there", lambda: asked.get("rules")["groups"])
        legends = dashboard_queries()
        places = {"dashboard": list(legends), "rules": rule_queries(asked), "runbook": runbook_queries()}
        for whose, queries in places.items():
            wanted = set(queries) - WITHOUT_DATA
            with step(f"the {len(wanted)} queries of the {whose} find data"):
                ended = time.monotonic() + LIMIT_S
                while wanted and time.monotonic() < ended:
                    wanted = {query for query in wanted if not asked.ask(query)}
                    time.sleep(0.3)
                if wanted:
                    sys.exit("FAILED: no data for\n" + "\n".join(sorted(wanted)))
            if sampled := [query for query in queries if "DCGM_" in query]:
                print(
                    f"   {len(sampled)} of them in {DCGM_SAMPLE}, in the form that dcgm-exporter writes, not on a GPU:"
                )
                print("".join(f"     {query}\n" for query in sampled), end="")
        with step(f"{len(WITHOUT_DATA)} more have the right syntax"):
            for query in WITHOUT_DATA:
                if query not in places["rules"]:
                    sys.exit(f"FAILED: no rule has the selector {query}")
                asked.ask(query)
        print("   without a GPU there is no data for them:")
        print("".join(f"     {query}\n" for query in sorted(WITHOUT_DATA)), end="")
        with step("the data of the dashboard have the labels that its legends name"):
            for query, labels in legends.items():
                if missing := labels - {label for one in asked.ask(query) for label in one["metric"]}:
                    sys.exit(f"FAILED: {query} has no {missing}")

        wait_until("the fragile model's callers see both", lambda: {OK, INTERNAL} <= load.codes)
        foreseen = {("GanserveErrorBudgetBurnsFast", ""), *(("GanserveModelRejected", one) for one in addresses)}
        with step("every rule is sound; the files that were rejected and the failed calls are alerts in Alertmanager"):
            rules = [rule for group in asked.get("rules")["groups"] for rule in group["rules"]]
            if ill := [rule["name"] for rule in rules if rule["health"] != "ok"]:
                sys.exit(f"FAILED: Prometheus cannot compute {ill}")
            wait_until("the alerts", lambda: foreseen <= firing(alertmanager))
        others = sorted({name for name, _ in firing(alertmanager)} - {name for name, _ in foreseen})
        print(f"   others that the load set off: {', '.join(others) or 'none'}")
        if unforeseen := set(others) - OF_LOAD:
            sys.exit(f"FAILED: alerts without a cause: {unforeseen}")

        down = ("GanserveReplicaDown", addresses[0])
        with step("kill -9 of a replica is an alert in Alertmanager"):
            process.kill()
            wait_until("the alert", lambda: down in firing(alertmanager))
        with step("and no longer once it has started again"):
            first.close()
            first.enter_context(replica(models, addresses[0], scratch / "a.log", *flags, *guarded.flags))
            wait_until("no alert", lambda: down not in firing(alertmanager))


if __name__ == "__main__":
    main()
