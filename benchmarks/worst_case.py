"""Measures the memory that clients can make a server keep with its default bounds, with all bounds filled at once.

Over TLS, without tokens: each connection fills its own buffers; then unfinished requests, unfinished health checks and
unread answers fill their pools. `ganserve-server bounds` prints the bound. The measurement is the growth of the
server's resident memory. Neither includes the kernel's buffers.

    python -m benchmarks.worst_case [--connections 2000] [--check]

--check exits with 1 if the memory exceeds the bound, or if the growth is above 64 MiB a minute after all clients left.
"""

import argparse
import resource
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import trustme
from benchmarks.running import Running, serving
from tests.wire import (
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    Peer,
    frame,
    granted,
    head,
    message,
    request,
)

from ganserve.v1 import generation_pb2 as pb
from ganserve_server.cli.bounds import worst_case_bytes
from ganserve_server.transport.http2 import literal
from ganserve_server.transport.limits import Limits

MODEL = "mlp-mnist"
IMAGES = 1024  # of one call: an answer of 784 KiB
CALLS_AT_ONCE = 8
LARGE_WINDOW = 1 << 20  # larger than an answer of IMAGES images
CHECK = "/grpc.health.v1.Health/Check"
# What is left are gaps in the heap: a second and a third round leave no more.
SETTLE_S, MOST_LEFT_MIB = 60.0, 64


def fill_connection(peer: Peer) -> None:
    """Make the server keep the most that it keeps for one connection."""
    # The header table's 4 KiB, in entries of the smallest size, and all cached headers.
    peer.head([*head("/x"), *((f"{number:x}", "") for number in range(100))], END_HEADERS | END_STREAM)
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/x"), (b"content-type", b"text/html")]
    start = b"".join(literal(name, value) for name, value in fields)
    for number in range(8):
        block = start + b"".join(literal(b"%c" % letter, b"%d" % number) for letter in range(97, 109))
        peer.send(HEADERS, END_HEADERS | END_STREAM, peer.new_id(), block + literal(b"z", bytes(b"v" * 400)))
    peer.ping()
    # An unfinished header block, and input that waits for its turn.
    stream = peer.new_id()
    peer.send(HEADERS, 0, stream, bytes(16_000))
    for _ in range(3):
        peer.send(CONTINUATION, 0, stream, bytes(16_000))
    peer.write(frame(CONTINUATION, 0, stream, bytes(16_384))[:-1])


def fill_tls(peer: Peer) -> None:
    """Make OpenSSL grow the buffers that it keeps, by an answer that is read."""
    granted(peer, 0, LARGE_WINDOW)
    assert peer.call(request(IMAGES // 2)).images


def fill_requests(peer: Peer, limits: Limits) -> None:
    """Send calls except for the last byte of their requests, more than a connection's share."""
    body = message(bytes(limits.max_request_bytes))[:-1]
    for _ in range(limits.request_bytes_each // limits.max_request_bytes + 1):
        peer.body(peer.head(head()), body, end=False)
    peer.ping()


def fill_unguarded(peer: Peer, limits: Limits) -> None:
    """Do the same with a service that needs no token."""
    body = message(bytes(limits.unguarded_request_bytes))[:-1]
    for _ in range(limits.unguarded_bytes_each // limits.unguarded_request_bytes):
        peer.body(peer.head(head(CHECK)), body, end=False)
    peer.ping()


def fill_answers(peer: Peer, limits: Limits) -> None:
    """Ask for more answers than a connection's share, and read none of them."""
    body = pb.GenerateImagesRequest(model=MODEL, count=IMAGES, seed=1).SerializeToString()
    calls = limits.answer_bytes_each // (IMAGES * 784) + 2
    for start in range(0, calls, CALLS_AT_ONCE):
        streams = [peer.start(body) for _ in range(min(CALLS_AT_ONCE, calls - start))]
        while not all(stream in peer.answers for stream in streams):
            assert peer.read() is not None


def attack(running: Running, limits: Limits, tls: ssl.SSLContext, peers: ExitStack) -> Iterator[str]:
    """Fill the bounds one after the other; yield the name of each once it is full."""

    def connect(settings: dict[int, int] | None = None) -> Peer:
        return peers.enter_context(Peer(running.address, settings, tls=tls))

    fillers = (
        ("unfinished requests", fill_requests, limits.request_bytes // limits.request_bytes_each + 1),
        ("unfinished health checks", fill_unguarded, limits.unguarded_bytes // limits.unguarded_bytes_each + 1),
        ("answers that are not read", fill_answers, limits.answer_bytes // limits.answer_bytes_each + 1),
    )
    used = sum(count for *_, count in fillers)
    for _ in range(limits.max_connections - used):
        peer = connect({INITIAL_WINDOW_SIZE: LARGE_WINDOW})
        fill_tls(peer)
        fill_connection(peer)
    yield f"{limits.max_connections - used} connections"
    for what, fill, count in fillers:
        for _ in range(count):
            fill(connect({INITIAL_WINDOW_SIZE: 0}), limits)
        yield what


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=Limits().max_connections)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    limits = Limits(max_connections=arguments.connections)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        chain, key = Path(scratch, "tls.crt"), Path(scratch, "tls.key")
        chain.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        tls = ssl.create_default_context()
        authority.configure_trust(tls)
        flags = [f"--tls-certificate-file={chain}", f"--tls-key-file={key}", "--workers=1", "--access-log=off"]
        # Filling takes longer than the default timeouts.
        times = [f"--{name}-timeout-s=3600" for name in ("header", "body", "write")]
        running = servers.enter_context(
            serving(*flags, *times, f"--max-connections={limits.max_connections}", "--drain-timeout-s=1")
        )
        for _ in range(3):
            with Peer(running.address, tls=tls) as first:
                assert first.call(request(64)).images
        before, bound = running.resident_mib(), worst_case_bytes(limits) / (1 << 20)
        print(f"{limits.max_connections} connections: at most {bound:.0f} MiB beside {before:.0f} MiB", flush=True)
        largest = 0.0
        with ExitStack() as peers:
            for what in attack(running, limits, tls, peers):
                kept = running.resident_mib() - before
                largest = max(largest, kept)
                print(f"{kept:7.0f} MiB with {what}", flush=True)
        until = time.monotonic() + SETTLE_S
        while (left := running.resident_mib() - before) > MOST_LEFT_MIB and time.monotonic() < until:
            time.sleep(0.5)
        print(f"{left:7.0f} MiB after all have left", flush=True)
    if arguments.check and (largest > bound or left > MOST_LEFT_MIB):
        sys.exit("that is more than the bounds allow")


if __name__ == "__main__":
    main()
