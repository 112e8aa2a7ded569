"""Sends a server invalid traffic: random and mutated frames, floods, and peers that stop in the middle.

After each batch, an ordinary call on another connection must still get the correct bytes. At the end, the log must have
no unexpected line, no connections or calls may remain, and the memory must be about the same as in the beginning.

    python benchmarks/hostile.py [--connections 2000] [--seed 0]
"""

import argparse
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from hpack import Encoder

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATHS = ("GenerateImages", "GenerateEach", "StreamImages", "ListModels", "GetModel", "Nothing")
BATCH = 50  # connections
SETTLE_S = 15.0
MAX_GROWTH_KIB = 64 << 10  # the memory that the allocator may keep from the largest answers


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(draw: random.Random, encoder: Encoder) -> bytes:
    fields = [
        (":method", draw.choices(("POST", "GET", ""), (20, 1, 1))[0]),
        (":scheme", "http"),
        (":path", f"/ganserve.v1.GenerationService/{draw.choice(PATHS)}"),
        ("content-type", draw.choices(("application/grpc", "text/html"), (20, 1))[0]),
        ("te", "trailers"),
    ]
    if draw.random() < 0.3:
        fields.append(("grpc-timeout", draw.choice(("1n", "5m", "1S", "x", "99999999H"))))
    if draw.random() < 0.2:
        fields.append(("grpc-encoding", draw.choice(("gzip", "deflate", "zstd"))))
    if draw.random() < 0.1:
        draw.shuffle(fields)
    if draw.random() < 0.1:
        fields.append((draw.choice(("X", "x", "", ":path", "connection")), "v" * draw.choice((1, 300))))
    return encoder.encode(fields, huffman=draw.random() < 0.5)


def body(draw: random.Random) -> bytes:
    generate = pb.GenerateImagesRequest(model="mlp-mnist", count=draw.choice((1, 2, 64)), seed=draw.randrange(9))
    one = draw.choice((generate, pb.StreamImagesRequest(generate=generate), pb.GenerateEachRequest(generate=generate)))
    content = one.SerializeToString()
    if draw.random() < 0.2:
        content = draw.randbytes(draw.randrange(60))
    size = len(content) if draw.random() < 0.9 else draw.randrange(2**32)
    return struct.pack(">BI", draw.choices((0, 1, 7), (20, 2, 1))[0], size) + content


def sequence(draw: random.Random) -> tuple[bytes, int]:
    """Make frames that are mostly valid, in a mostly invalid order; return their bytes and their number."""
    encoder, data, opened, count = Encoder(), bytearray(), [1], draw.randrange(1, 40)
    for _ in range(count):
        kind = draw.choices(range(11), (12, 12, 1, 4, 2, 0.2, 1, 0.2, 4, 0.5, 0.5))[0]
        stream = draw.choices((draw.choice(opened), opened[-1], 0, draw.randrange(2**31)), (5, 10, 0.3, 0.1))[0]
        flags, payload = draw.choice((0, 0, 1, 1, 4, 8, 0x20, draw.randrange(256))), draw.randbytes(draw.randrange(20))
        if kind == 0:
            flags, payload = draw.choice((0, 1)), body(draw)
            if draw.random() < 0.2:
                flags, payload = flags | 8, b"\x03" + payload + b"\0\0\0"
        elif kind == 1:
            if draw.random() < 0.95:
                stream = opened[-1] + 2
                opened.append(stream)
            flags, payload = draw.choices((4, 5, 0), (10, 5, 0.5))[0], header_block(draw, encoder)
        elif kind in (3, 8):
            payload = draw.choice((bytes(4), b"\0\0\0\x08", b"\0\0\xff\0", b"\x7f\xff\xff\xff"))
        elif kind == 4:
            stream, flags = 0, 0
            payload = struct.pack(">HI", draw.choice((1, 3, 4, 4, 4, 5, 9)), draw.choice((0, 1, 100, 65535, 1 << 20)))
        elif kind == 6:
            stream, payload = 0, bytes(8)
        data += frame(kind, flags, stream, payload)
    if draw.random() < 0.3:
        for _ in range(draw.randrange(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    if draw.random() < 0.2:
        del data[draw.randrange(len(data)) :]
    return bytes(data), count


def flood(draw: random.Random) -> tuple[bytes, int]:
    """Make many frames of one kind that costs a peer little; return their bytes and their number."""
    block = header_block(draw, Encoder())
    count = draw.choice((100, 2000))
    kinds: list[Callable[[int], bytes]] = [
        lambda _: frame(6, 0, 0, bytes(8)),
        lambda _: frame(4, 0, 0),
        lambda n: frame(4, 0, 0, struct.pack(">HI", 4, n)),
        lambda n: frame(1, 5, 2 * n + 1, block),
        lambda n: frame(1, 4, 2 * n + 1, block) + frame(3, 0, 2 * n + 1, bytes(4)),
        lambda n: frame(1, 4, 2 * n + 1, block) + frame(0, 0, 2 * n + 1),
        lambda n: frame(8, 0, 0, b"\0\0\0\x01"),
        lambda n: frame(1, 0, 1, block[:4]) if not n else frame(9, 0, 1, b"\0"),
        lambda n: frame(2, 0, 2 * n + 1, bytes(5)),
        lambda n: frame(99, 0, n, b"x"),
    ]
    make = draw.choice(kinds)
    return b"".join(make(number) for number in range(count)), count


def attack(address: tuple[str, int], draw: random.Random) -> tuple[str, int]:
    """Open a connection, misuse it, and leave; return how, and the number of frames."""
    kind = draw.choices(("sequence", "flood", "noise", "silence"), (20, 2, 1, 1))[0]
    start, count = PREFACE + frame(4, 0, 0), 1
    data = b""
    if kind == "sequence":
        data, count = sequence(draw)
    elif kind == "flood":
        data, count = flood(draw)
    elif kind == "noise":
        start, data = draw.choice((b"", start)), draw.randbytes(draw.randrange(2000))
    else:
        start = start[: draw.randrange(len(start))]
    with socket.create_connection(address) as peer, contextlib.suppress(OSError):
        peer.settimeout(draw.choice((0.001, 0.01, 0.03)))
        data = start + data
        if draw.random() < 0.1:
            for cut in range(0, len(data), max(1, len(data) // 10)):
                peer.sendall(data[cut : cut + max(1, len(data) // 10)])
        else:
            peer.sendall(data)
        if draw.random() < 0.2:
            peer.shutdown(socket.SHUT_WR)
        if draw.random() < 0.1:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves by RST
        elif draw.random() < 0.8:
            while peer.recv(1 << 16):
                pass
    return kind, count


class Server:
    """A running server, whose log is kept."""

    def __init__(self) -> None:
        program = Path(sys.executable).with_name("ganserve-server")
        command = [program, "--address", "127.0.0.1:0", "--metrics-address", "off", "--log-format", "json"]
        self.process = subprocess.Popen(
            [str(part) for part in (*command, "--access-log", "off")], stderr=subprocess.PIPE, text=True
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            event = json.loads(line)
            if event["event"] == "serving":
                break
        self.address = event["address"]
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()))
        self._reader.start()

    def stop(self) -> int:
        self.process.terminate()
        return self.close(60)

    def close(self, timeout_s: float | None = None) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def running() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.process.kill()
        server.close()


def memory_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def open_sockets(pid: int) -> int:
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(descriptor.readlink()).startswith("socket:")
    return count


def settled_sockets(pid: int, wanted: int) -> int:
    """Return the number of the server's sockets after it has closed those of disconnected peers."""
    end = time.monotonic() + SETTLE_S
    while (count := open_sockets(pid)) > wanted and time.monotonic() < end:
        time.sleep(0.05)
    return count


def run(connections: int, seed: int, progress: Callable[[str], None] = lambda _: None) -> dict[str, object]:
    """Attack a server; return the observations."""
    draw, kinds, frames, wrong = random.Random(seed), Counter[str](), 0, 0
    with running() as server, grpc.insecure_channel(server.address) as channel:
        host, _, port = server.address.rpartition(":")
        pid, stub = server.process.pid, pb_grpc.GenerationServiceStub(channel)
        ask = pb.GenerateImagesRequest(model="mlp-mnist", count=3, seed=5)
        expected = stub.GenerateImages(ask).pixels

        def batch(size: int) -> None:
            nonlocal frames, wrong
            for _ in range(size):
                kind, count = attack((host, int(port)), draw)
                kinds[kind] += 1
                frames += count
            wrong += stub.GenerateImages(ask, timeout=10).pixels != expected

        sockets = open_sockets(pid)
        batch(min(connections, 4 * BATCH))  # a warm-up: memory that the first use allocates is not a leak
        settled_sockets(pid, sockets)
        before = memory_kib(pid)
        while (done := sum(kinds.values())) < connections:
            batch(min(BATCH, connections - done))
            progress(f"{done} connections, {frames} frames, {memory_kib(pid)} KiB")
        left = settled_sockets(pid, sockets) - sockets
        after = memory_kib(pid)
        code = server.stop()
    # Including lines that are not JSON, such as a traceback from the interpreter.
    bad = [line for line in server.log if '"draining"' not in line and '"stopped"' not in line]
    return {
        "connections": dict(kinds),
        "frames": frames,
        "ordinary calls that were answered wrongly": wrong,
        "connections left": left,
        "log lines that should not be": bad,
        "exit status": code,
        "memory before, KiB": before,
        "memory after, KiB": after,
        "ok": not (wrong or left or bad or code or after - before > MAX_GROWTH_KIB),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = run(arguments.connections, arguments.seed, lambda text: print(text, end="\r", file=sys.stderr))
    print(json.dumps(result, indent=2))
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
