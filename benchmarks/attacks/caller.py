"""The good caller, in a separate process: makes one call after the other, and checks each answer."""

import socket
import ssl
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import NamedTuple

from benchmarks.attacks.line import DEFAULT_WINDOW, MAX_WINDOW
from benchmarks.attacks.patterns import PIXELS
from tests.wire import WINDOW_UPDATE, Peer, request

PAUSE_S = 0.005
TIMEOUT_S = 10.0
CALLS_A_CONNECTION = 10  # so that connecting is part of what is measured
LARGE_EVERY, LARGE = 4, 32  # images: an answer of 25 kB, which must wait in the pool of answers
WARM_UP = 20


class Sample(NamedTuple):
    """One call."""

    began: float  # by time.monotonic
    seconds: float
    error: str  # empty if there is none


def run(address: str, authority: str, stop: Event, told: Connection) -> None:
    """Call until `stop` is set; send a message when the first calls are done, and all samples at the end."""
    tls = None
    if authority:
        tls = ssl.create_default_context(cafile=authority)
        tls.set_alpn_protocols(["h2"])
    samples: list[Sample] = []
    peer: Peer | None = None
    while not stop.is_set():
        number, began, error = len(samples), time.monotonic(), ""
        try:
            if peer is None:
                peer = Peer(address, tls=tls)
                peer.socket.settimeout(TIMEOUT_S)
                peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peer.send(WINDOW_UPDATE, 0, 0, (MAX_WINDOW - DEFAULT_WINDOW).to_bytes(4, "big"))
            error = call(peer, 1 if number % LARGE_EVERY else LARGE)
        except (OSError, AssertionError) as problem:
            error = f"{type(problem).__name__}: {problem}"[:100]
        samples.append(Sample(began, time.monotonic() - began, error))
        if peer is not None and (error or not (number + 1) % CALLS_A_CONNECTION):
            peer.socket.close()
            peer = None
        if number == WARM_UP:
            told.send(None)
        stop.wait(PAUSE_S)
    told.send(samples)


def call(peer: Peer, count: int) -> str:
    """Make one call; return the error, or an empty text."""
    answer = peer.call(request(count))
    if answer.reset:
        return f"reset by {answer.reset}"
    end = answer.blocks[-1]
    if end.get("grpc-status") != "0":
        return f"status {end.get('grpc-status')}: {end.get('grpc-message')}"[:100]
    return "" if len(answer.images.pixels) == count * PIXELS else "the wrong answer"
