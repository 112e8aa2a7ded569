"""The inputs that fuzzing begins with: what tests say on the wire, and what benchmarks/hostile.py makes up.

python -m tests.fuzz.seeds     writes those that the corpus lacks
"""

import gzip
import random
import struct

from benchmarks import hostile
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hpack import Encoder
from tests.wire import (
    ACK,
    CONTINUATION,
    DATA,
    EACH,
    END_HEADERS,
    END_STREAM,
    GENERATE,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    RST_STREAM,
    SERVICE,
    SETTINGS,
    STREAM,
    WINDOW_UPDATE,
    frame,
    head,
    message,
)

from ganserve.v1 import generation_pb2 as pb

HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
GREETED = bytes(2)  # the options of most inputs
_HOSTILE = 40
_MAX_INPUT = 3000


def block(path: str, *more: tuple[str, str], huffman: bool = False, **changes: str | None) -> bytes:
    """Write a header block that needs no table."""
    return Encoder().encode(
        [(name.encode(), value.encode()) for name, value in head(path, *more, **changes)], huffman=huffman
    )


def ask(**fields: object) -> pb.GenerateImagesRequest:
    """Make a request for a model that the fuzzed server has."""
    return pb.GenerateImagesRequest(**({"model": "digits", "count": 2, "seed": 1} | fields))  # type: ignore[arg-type]


REQUESTS = [
    ask(),
    ask(model="plain", count=200),
    ask(model="none"),
    ask(count=0),
    ask(label_names=["one", "two"]),
    ask(labels=[0, 2], truncation=0.5),
    pb.GenerateImagesRequest(model="plain", latents=pb.Latents(values=[0.5] * 6)),
    ask(encoding=pb.ENCODING_PNG),
    ask(count=4, encoding=pb.ENCODING_WEBP, layout=pb.LAYOUT_CONTACT_SHEET),
    ask(count=13),
    ask(count=14),
]
_EACH = [pb.GenerateEachRequest(generate=one).SerializeToString() for one in REQUESTS]
_STREAM = pb.StreamImagesRequest(generate=ask(count=1000)).SerializeToString()
_CHECK = health_pb2.HealthCheckRequest(service="plain").SerializeToString()
_LIST = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()

HEADER_BLOCKS = [
    *(block(path) for path in (GENERATE, EACH, STREAM, SERVICE + "GetModel", HEALTH + "Check", HEALTH + "Watch")),
    block(REFLECTION),
    block("/nothing", huffman=True),
    block(GENERATE, ("grpc-timeout", "10m"), ("grpc-encoding", "gzip"), ("authorization", "Bearer x")),
    block(EACH, ("grpc-encoding", "deflate"), ("grpc-timeout", "1S"), ("x-request-id", "mine")),
    block(GENERATE, method="GET"),
    block(GENERATE, content_type="text/html"),
    block(GENERATE, ("content-length", "20")),
    block(GENERATE, (":path", "/late")),
    Encoder().encode(list(head(GENERATE))),  # fills the table
    b"\x82\x86\xbe\xbf\xc0\xc1",  # asks for what is in the table
    b"\x20\x3f\xe1\x1f" + block(GENERATE),  # the table's size changes twice
    Encoder().encode([(b"grpc-status", b"0")], huffman=False),  # trailers
]
BODIES = [
    *(message(one.SerializeToString()) for one in REQUESTS),
    *(message(one) for one in (_EACH[0], _STREAM, _CHECK, _LIST, b"", b"\xff\xff")),
    message(_EACH[0]) * 20,
    message(gzip.compress(_EACH[0]), 1),
    message(gzip.compress(bytes(19_000)), 1),
    message(bytes(50), 2),
    b"\0\0\0\0\x40half",
]


def call(path: str, *bodies: bytes, stream: int = 1, flags: int = 0, more: tuple[tuple[str, str], ...] = ()) -> bytes:
    """Write a call whose last DATA ends it."""
    opened = frame(HEADERS, END_HEADERS | flags, stream, block(path, *more))
    parts = [frame(DATA, 0, stream, body) for body in bodies[:-1]]
    return opened + b"".join(parts) + frame(DATA, END_STREAM, stream, bodies[-1])


def calls() -> list[bytes]:
    """Return inputs that follow the rules, and some that break one."""
    each = b"".join(message(one) for one in _EACH)
    generate = message(REQUESTS[0].SerializeToString())
    opened = frame(HEADERS, END_HEADERS, 1, block(EACH))
    window = frame(SETTINGS, 0, 0, struct.pack(">HIHI", INITIAL_WINDOW_SIZE, 10, MAX_FRAME_SIZE, 20_000))
    return [
        *(call(GENERATE, message(one.SerializeToString())) for one in REQUESTS),
        call(STREAM, message(_STREAM)),
        call(EACH, each),
        call(EACH, message(gzip.compress(_EACH[0]), 1), more=(("grpc-encoding", "gzip"),)),
        call(SERVICE + "ListModels", message(b"")) + call(HEALTH + "Check", message(_CHECK), stream=3),
        call(HEALTH + "Watch", message(_CHECK)) + frame(RST_STREAM, 0, 1, bytes(4)),
        call(REFLECTION, message(_LIST)),
        call(GENERATE, generate[:7], generate[7:]),
        call(GENERATE, generate, more=(("grpc-timeout", "1m"), ("authorization", "Bearer x"))),
        opened + frame(DATA, 0, 1, each[:40]) + frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\x00\x01a\x01b"),
        opened + frame(DATA, PADDED, 1, b"\x03" + each + b"\0\0\0") + frame(RST_STREAM, 0, 1, b"\0\0\0\x08"),
        window + call(STREAM, message(_STREAM)) + frame(WINDOW_UPDATE, 0, 1, b"\0\0\x10\0") * 3,
        call(STREAM, message(_STREAM)) + frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\1") + window,
        call(STREAM, message(_STREAM)) + window + frame(WINDOW_UPDATE, 0, 0, b"\0\0\x10\0"),
        frame(HEADERS, END_STREAM, 1, block(GENERATE)[:9]) + frame(CONTINUATION, END_HEADERS, 1, block(GENERATE)[9:]),
        frame(HEADERS, END_HEADERS | PRIORITY_FLAG, 1, bytes(5) + block(GENERATE)) + frame(PRIORITY, 0, 3, bytes(5)),
        frame(PING, 0, 0, bytes(8)) * 70 + frame(SETTINGS, ACK, 0) + frame(GOAWAY, 0, 0, bytes(8)),
    ]


def seeds() -> list[bytes]:
    """Return all inputs, the options first."""
    draw = random.Random(0)
    made: list[bytes] = []
    for number, one in enumerate(calls()):
        made += [GREETED + one, b"\4\0" + one, bytes((number * 37 & 0xFE, number % 8)) + one]
    made += [
        b"\1\0" + PREFACE + frame(SETTINGS, 0, 0) + calls()[0],
        b"\1\0GET / HTTP/1.1\r\n\r\n",
        b"\1\0" + PREFACE[:20],
    ]
    while len(made) < _HOSTILE + 3 * len(calls()) + 3:
        data, _ = hostile.sequence(draw)
        if len(data) <= _MAX_INPUT:
            made.append(bytes((draw.randrange(256) & 0xFE, draw.randrange(8))) + data)
    return made
