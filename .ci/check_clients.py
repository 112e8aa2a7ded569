"""Real clients of gRPC and HTTP/2 against real servers: plain, by TLS, and through Envoy, HAProxy and nginx.

Each client is a program of clients.d/, which runs the scenarios that it is asked for. deploy/envoy.yaml and
deploy/haproxy.cfg run as they are, but for addresses. Meanwhile other callers hold streams open on the same servers and
proxies, which no client may break. `.ci/clients` installs and builds what this needs.

unary      one image
pixels     images with the same bytes as those that the SDK gets
each       GenerateEach: requests one by one, an error that is one request's alone, half-close, OK at the end
stream     StreamImages, many times the first window
deadline   1 ms and 300 ms for a request that does not end: DEADLINE_EXCEEDED, and the connection still serves calls
cancel     an endless stream: CANCELLED, the connection still serves calls, the server's call ends
gzip       a compressed request
metadata   12 KB are accepted
oversized  20 KB are an error of that call alone: the connection's other stream continues, and it takes new calls
bounds     headers of 12 to 18 KB in 1 to 150 fields: any answer is right, but no other caller's stream ends
details    google.rpc.Status with BadRequest and ErrorInfo
keepalive  a stream without messages for 12 s, with a PING each second
streams    1,000 streams open at once on one connection
age        calls for 5 s to a server whose connections end after 1 s: no error
table_N    a client with N bytes for the table of header compression
requests   5,000 calls on 4 connections

    python .ci/check_clients.py FOLDER [--only CLIENT,…] [--ways WAY,…]
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import google.rpc
import grpc
import trustme

from ganserve import Client, GanserveError
from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import balancing  # noqa: E402  (it runs deploy/'s files)

PROGRAMS = ROOT / ".ci" / "clients.d"
SERVER = Path(sys.executable).with_name("ganserve-server")
PLAIN, TLS, ENVOY, HAPROXY, NGINX = "plain", "TLS", "Envoy", "HAProxy", "nginx"
NO_TABLE = "Envoy without a table"
PROXIES = (ENVOY, HAPROXY, NGINX, NO_TABLE)
WAYS = (PLAIN, TLS, *PROXIES)
OF_GRPC = (
    *("unary", "pixels", "each", "stream", "deadline", "cancel", "gzip", "metadata", "oversized", "details"),
    *("streams", "keepalive", "age"),
)
QUIET = ("keepalive",)  # nothing but waiting
LIMIT_S = 300.0  # of a program
BYSTANDERS = 4  # of each way
EXCHANGE_S = 0.5
READY_LIMIT_S = 60.0
IDLE_LIMIT_S = 15.0


@dataclass(frozen=True)
class ClientProgram:
    """How a client is run, what it is asked for, and why not for the rest."""

    name: str
    command: tuple[str, ...]
    scenarios: tuple[str, ...]
    lacks: dict[str, str] = field(default_factory=dict)


def clients(folder: Path) -> list[ClientProgram]:
    def of_grpc(name: str, *command: str | Path, **lacks: str) -> ClientProgram:
        scenarios = tuple(scenario for scenario in OF_GRPC if scenario not in lacks)
        return ClientProgram(name, tuple(map(str, command)), scenarios, lacks)

    def of_http(name: str, scenarios: str, *command: str | Path) -> ClientProgram:
        return ClientProgram(name, tuple(map(str, command)), tuple(scenarios.split()))

    python, node = sys.executable, "node"
    return [
        ClientProgram("grpcio", (python, str(PROGRAMS / "grpcio_sync.py")), ("bounds", *OF_GRPC)),
        of_grpc("grpcio aio", python, PROGRAMS / "grpcio_aio.py"),
        of_grpc(
            "grpclib",
            python,
            PROGRAMS / "grpclib_aio.py",
            gzip="it cannot compress",
            age="it drops its calls when GOAWAY comes",
        ),
        of_grpc("grpc-js", node, folder / "node" / "grpc_js.mjs"),
        of_grpc(
            "connect-node",
            node,
            folder / "node" / "connect_node.mjs",
            age="it does not repeat calls that Node refuses by itself when GOAWAY comes, as grpc-js does",
        ),
        of_grpc("grpc-go", folder / "grpc_go"),
        of_grpc("grpc++", folder / "grpc_cpp"),
        of_grpc(
            "tritonclient",
            python,
            PROGRAMS / "tritonclient_sync.py",
            each="it has no such call",
            cancel="it has no endless call",
            details="it does not hand them on",
            streams="it has one stream at a time",
        ),
        of_http(
            "Node's http2",
            "pixels each deadline metadata oversized streams keepalive table_0 table_1024",
            node,
            folder / "node" / "node_http2.mjs",
        ),
        of_http("curl", "unary pixels each stream gzip metadata oversized details", python, PROGRAMS / "curl.py"),
        of_http("nghttp", "pixels metadata table_0 table_100 table_1024", python, PROGRAMS / "nghttp.py"),
        of_http("h2load", "requests streams table_0", python, PROGRAMS / "h2load.py"),
    ]


# Servers and proxies.


@dataclass(frozen=True)
class Way:
    """An address to call, and the same to servers whose connections end after a second."""

    name: str
    address: str
    aged_address: str
    ca_file: str = ""


@contextmanager
def process(command: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as file:
        running = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


@dataclass
class Server:
    """A server that was started here."""

    address: str
    metrics_address: str
    log: Path
    process: "subprocess.Popen[bytes]"

    def check_running(self) -> None:
        if self.process.poll() is not None:  # another server may answer at the address
            sys.exit(f"FAILED: the server {self.address} ended: {self.log.read_text()[-1000:]}")

    def calls(self) -> int:
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return next(int(float(line.split()[1])) for line in lines if line.startswith("ganserve_calls "))


@contextmanager
def server(scratch: Path, host: str, port: int, *flags: str) -> Iterator[Server]:
    address, metrics_address, log = f"{host}:{port}", f"{host}:{port + 1}", scratch / f"server-{host}-{port}.log"
    command = [str(SERVER), f"--address={address}", f"--metrics-address={metrics_address}"]
    with process([*command, "--workers=1", "--log-format=json", *flags], log) as running:
        yield Server(address, metrics_address, log, running)


def changed(file: Path, changes: dict[str, str]) -> None:
    text = file.read_text()
    for old, new in changes.items():
        if old not in text:
            sys.exit(f"FAILED: {file.name} has no {old!r}")
        text = text.replace(old, new)
    file.write_text(text)


def proxy_command(name: str, site: balancing.Site) -> list[str]:
    """Write a proxy's configuration; return how it is started.

    Here a slow answer must not make a replica a dead one: the machine may be busy, and there is no other replica.
    """
    if name == NGINX:
        file = Path(shutil.copy(PROGRAMS / "nginx.conf", site.scratch))
        addresses = {"LISTEN": f"{site.here.ip}:{site.proxy_port}", "SERVER": f"{site.known[0]}:{site.port}"}
        changed(file, addresses | {"FOLDER": str(site.scratch)})
        return [balancing.program("nginx", "apt-get install nginx"), "-p", str(site.scratch), "-c", str(file)]
    if name == HAPROXY:
        command = balancing.haproxy(site, balancing.RETRIES)
        changes = {
            "timeout connect 1s": "timeout connect 10s",
            "timeout check 500ms": "timeout check 10s",
            "fall 1 ": "fall 10 ",
            "hold valid 2s": "hold valid 2s\n  hold timeout 1h",
        }
        changed(site.scratch / "haproxy.cfg", changes)
        return command
    command = balancing.envoy(site, balancing.RETRIES)
    changes = {
        "connect_timeout: 1s": "connect_timeout: 10s",
        "interval: 1s, timeout: 1s }": "interval: 1s, timeout: 20s }",
        "timeout: 0.5s": "timeout: 10s",
    }
    if name == NO_TABLE:
        upstream, admin = "explicit_http_config:\n          http2_protocol_options:\n", site.proxy_port + 2
        changes[upstream] = f"{upstream}            hpack_table_size: 0\n"
        changes[f"port_value: {admin}"] = f"port_value: {admin + 1}"  # the other Envoy has that one
    changed(site.scratch / "envoy.yaml", changes)
    return command


@contextmanager
def proxy(name: str, scratch: Path, host: str, server: Server) -> Iterator[str]:
    """Run a proxy before a server; yield its address."""
    ip, _, port = server.address.rpartition(":")
    (folder := scratch / f"{name}-{port}").mkdir()
    site = balancing.Site(balancing.Host(host), [], int(port), folder, known=[ip])
    with balancing.name_server(site), process(proxy_command(name, site), scratch / f"{name}-{port}.log"):
        yield f"{host}:{site.proxy_port}"


@contextmanager
def running(scratch: Path, port: int, names: list[str]) -> Iterator[tuple[list[Way], list[Server]]]:
    """Run all servers and proxies."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.3")
    authority.cert_pem.write_to_path(ca_file := scratch / "ca.pem")
    certificate.private_key_pem.write_to_path(key_file := scratch / "server.key")
    with (scratch / "server.pem").open("wb") as chain:
        chain.writelines(each.bytes() for each in certificate.cert_chain_pems)
    tls = (f"--tls-certificate-file={scratch / 'server.pem'}", f"--tls-key-file={key_file}")
    aged = ("--max-connection-age-s=1",)
    with ExitStack() as stack:
        plain, aged_plain, secure, aged_secure = servers = [
            # A few clients at once open 1,000 streams each.
            stack.enter_context(server(scratch, host, port + more, "--max-queue-images=100000", *flags))
            for host, more, flags in (
                ("127.0.0.2", 0, ()),
                ("127.0.0.2", 10, aged),
                ("127.0.0.3", 0, tls),
                ("127.0.0.3", 10, (*aged, *tls)),
            )
        ]
        ways = [
            Way(PLAIN, plain.address, aged_plain.address),
            Way(TLS, secure.address, aged_secure.address, str(ca_file)),
        ]
        for number, name in enumerate(PROXIES):
            if name in names:
                host = f"127.0.0.{11 + number}"
                addresses = [
                    stack.enter_context(proxy(name, scratch, host, each))
                    for each in (plain, aged_plain)
                    if name != NO_TABLE or each is plain
                ]
                ways.append(Way(name, addresses[0], addresses[-1]))
        yield [way for way in ways if way.name in names], servers


def not_ready(way: Way, scratch: Path) -> str:
    """Wait until a way leads to a server; return what is wrong if it does not."""
    for address in {way.address, way.aged_address}:
        try:
            with Client(address, ca_file=way.ca_file or None) as client:
                client.wait_until_ready(READY_LIMIT_S)
        except GanserveError as error:
            logs = (f"{log.name}: {log.read_text()[-1000:]}" for log in scratch.glob(f"{way.name}-*.log"))
            return "\n".join((f"{error}; the logs:", *logs))
    return ""


# The clients, and those who must not be disturbed by them.


@dataclass(frozen=True)
class Given:
    """What every program gets."""

    pixels: Path
    environment: dict[str, str]


def given(folder: Path, pixels: Path) -> Given:
    published = Path(
        next(iter(google.rpc.__path__))
    ).parent.parent  # googleapis-common-protos has the .proto files, too
    return Given(
        pixels,
        os.environ
        | {
            "GRPC_VERBOSITY": "NONE",
            "NODE_NO_WARNINGS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(folder / "python"), os.environ.get("PYTHONPATH")))),
            "PROTO_PATH": f"{ROOT / 'proto'}:{published}",
            "DESCRIPTORS": str(folder / "descriptors.binpb"),
        },
    )


def run(client: ClientProgram, way: Way, scenarios: list[str], address: str, all_get: Given) -> dict[str, str]:
    """Run scenarios; return what was wrong with each, which is nothing if it passed."""
    command = [*client.command, address, way.ca_file, str(all_get.pixels), *scenarios]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=all_get.environment
    ) as program:
        timer = threading.Timer(LIMIT_S, program.kill)
        timer.start()
        assert program.stdout is not None
        output = program.stdout.read()
        timer.cancel()
    results = dict.fromkeys(scenarios, f"no result; the output ends with: {output[-500:]}")
    for line in output.splitlines():
        kind, _, rest = line.partition(" ")
        name, _, wrong = rest.partition(": ")
        if kind in ("ok", "failed") and name in results:
            results[name] = wrong if kind == "failed" else ""
    return results


class Bystander:
    """Another caller, with a stream on a connection of its own."""

    def __init__(self, way: Way) -> None:
        self.way, self.wrong = way, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        if self.way.ca_file:
            credentials = grpc.ssl_channel_credentials(Path(self.way.ca_file).read_bytes())
            channel = grpc.secure_channel(self.way.address, credentials, options)
        else:
            channel = grpc.insecure_channel(self.way.address, options)
        with channel:
            try:
                answers = sum(1 for _ in pb_grpc.GenerationServiceStub(channel).GenerateEach(self._requests()))
                if answers < self.asked:
                    self.wrong = f"{answers} answers to {self.asked} requests"
            except grpc.RpcError as error:
                self.wrong = f"its stream ended at {time.strftime('%H:%M:%S')}: {error.code().name}: {error.details()}"

    def _requests(self) -> Iterator[pb.GenerateEachRequest]:
        self.asked = 0
        generate = pb.GenerateImagesRequest(model="mlp-mnist", count=1, seed=1)
        while not self._end.wait(EXCHANGE_S):
            self.asked += 1
            yield pb.GenerateEachRequest(generate=generate)

    def close(self) -> None:
        self._end.set()
        self._thread.join()


Results = dict[tuple[str, str, str], str]  # by client, scenario and way: what was wrong, or nothing


def run_all(chosen: list[ClientProgram], ways: list[Way], all_get: Given) -> Results:
    results: Results = {}
    futures: list[tuple[ClientProgram, Way, Future[dict[str, str]]]] = []
    with ThreadPoolExecutor(1 + (os.cpu_count() or 1)) as busy, ThreadPoolExecutor(8) as quiet:
        for client in chosen:
            for way in ways:
                wanted = [name for name in client.scenarios if way.name != NO_TABLE or name == "pixels"]
                for pool, address, names in (
                    (quiet, way.address, [name for name in wanted if name in QUIET]),
                    (busy, way.aged_address, [name for name in wanted if name == "age"]),
                    (busy, way.address, [name for name in wanted if name != "age" and name not in QUIET]),
                ):
                    if names:
                        futures.append((client, way, pool.submit(run, client, way, names, address, all_get)))
    for client, way, future in futures:
        results |= {(client.name, name, way.name): wrong for name, wrong in future.result().items()}
    return results


def print_table(chosen: list[ClientProgram], ways: list[Way], results: Results) -> None:
    print(f"| client | scenario | {' | '.join(way.name for way in ways)} |\n|---|---{'|---' * len(ways)}|")
    for client in chosen:
        for name in (*client.scenarios, *client.lacks):
            cells = []
            for way in ways:
                wrong = results.get((client.name, name, way.name))
                cells.append("n.a." if wrong is None else "FAILED" if wrong else "ok")
            print(f"| {client.name} | {name} | {' | '.join(cells)} |")
    print(f"\nn.a.: of {NO_TABLE}, only pixels is asked for.")
    for client in chosen:
        for name, why in client.lacks.items():
            print(f"n.a.: {client.name}, {name}: {why}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what .ci/clients installed and built")
    parser.add_argument("--only", help="clients, with commas between them")
    parser.add_argument("--ways", help=f"of {','.join(WAYS)}")
    parser.add_argument("--port", type=int, default=25600, help="the first of twenty, on 127.0.0.2 and its neighbours")
    options = parser.parse_args()
    every = clients(options.folder)
    chosen = [client for client in every if options.only is None or client.name in options.only.split(",")]
    names = list(WAYS) if options.ways is None else options.ways.split(",")
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        scratch = Path(temporary)
        started = time.monotonic()
        ways, servers = stack.enter_context(running(scratch, options.port, names))
        for way in list(ways):
            if wrong := not_ready(way, scratch):
                broken.append(f"{way.name}: {wrong}")
                ways.remove(way)
        for each in servers:
            each.check_running()
        pixels = scratch / "pixels"
        with Client(servers[0].address) as client:
            pixels.write_bytes(client.generate("cdcgan-mnist", count=16, seed=1).pixels.tobytes())
        bystanders = [Bystander(way) for way in ways for _ in range(BYSTANDERS)]
        results = run_all(chosen, ways, given(options.folder, pixels))
        for bystander in bystanders:
            bystander.close()
            if bystander.wrong:
                broken.append(f"another caller, {bystander.way.name}: {bystander.wrong}")
        end = time.monotonic() + IDLE_LIMIT_S
        for each in servers:
            while (calls := each.calls()) and time.monotonic() < end:
                time.sleep(0.1)
            if calls:
                broken.append(f"the server {each.address} has {calls} calls that nobody waits for")
        stack.close()
        logs = {log.name: log.read_text() for log in scratch.glob("*.log")}
        for each in servers:
            lines = each.log.read_text().splitlines()
            broken += [f"the server's log: {line[:500]}" for line in lines if '"level": "error"' in line]
            if each.process.returncode:
                broken.append(f"the server {each.address} ended with status {each.process.returncode}")
    print_table(chosen, ways, results)
    broken += [f"{', '.join(key)}: {wrong[:600]}" for key, wrong in results.items() if wrong]
    passed = sum(not wrong for wrong in results.values())
    print(f"{passed} of {len(results)} passed, in {time.monotonic() - started:.0f} s")
    for name, text in logs.items():
        if any(wrong and name.startswith(f"{way}-") for (_, _, way), wrong in results.items()):
            print(f"{name}: {text[-2000:]}")
    for text in broken:
        print(f"FAILED: {text}", file=sys.stderr)
    sys.exit(bool(broken))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what was started
    main()
