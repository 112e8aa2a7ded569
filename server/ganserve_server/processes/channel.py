"""The channel between a worker and its supervisor, from the worker's side.

The supervisor sends requests, each a line of JSON such as {"do": "load", "model": NAME}; the other requests are unload,
reload and refresh. The worker answers each request with a line. It sends its first line without a request, once it
serves.
"""

import asyncio
import json
import shutil
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from ganserve_server.shared.scoreboard import Scoreboard

WORKER_VARIABLE = "GANSERVE_WORKER"  # set in the environment of a worker
MAX_LINE_BYTES = 64 << 20  # room for a gRPC message in JSON, or for the states of 200 000 versions


class SupervisorChannel:
    """The data that a worker gets from its supervisor, and the connection to the supervisor.

    Args:
        variable: the content of the environment variable WORKER_VARIABLE.
    """

    def __init__(self, variable: str) -> None:
        given = json.loads(variable)
        self.number: int = given["number"]
        self.board = Scoreboard(given["board"], given["workers"], self.number)
        self.sockets = [socket.socket(fileno=descriptor) for descriptor in given["sockets"]]
        self.rates: int = given["rates"]  # the descriptor of the memory for the tokens' rates
        self.unloaded: list[str] = given["unloaded"]  # models that an operator has unloaded
        self.replaces: bool = given["replaces"]  # whether this worker replaces one that ended
        self.gone = asyncio.Event()  # set when the supervisor is gone
        self._channel = socket.socket(fileno=given["channel"])
        self._writer: asyncio.StreamWriter | None = None
        self._folder: str = given["folder"]

    @property
    def logs_for_all(self) -> bool:
        """Whether this worker logs the lines that are identical in all workers."""
        return self.board.leads if self.board.takes_part else self.replaces or not self.number

    async def follow(self, stop: asyncio.Event, answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> None:
        """Answer the supervisor's requests; set `stop` when the supervisor is gone."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._channel, limit=MAX_LINE_BYTES)
        with suppress(OSError):
            while (line := await reader.readline()).endswith(b"\n"):
                self.send(await answer(json.loads(line)))
        self.gone.set()
        stop.set()

    def send(self, message: dict[str, Any]) -> None:
        """Send the supervisor a message."""
        line = json.dumps(message).encode() + b"\n"
        if self._writer is None:
            with suppress(OSError):  # the supervisor is gone: `follow` notices that
                self._channel.sendall(line)
        else:
            self._writer.write(line)

    def close(self) -> None:
        """Remove the metrics' files if the supervisor, which owns them, is gone."""
        if self.gone.is_set():
            shutil.rmtree(self._folder, ignore_errors=True)
