"""The channel between a worker and its supervisor, from the worker's side.

The supervisor sends requests, each a line of JSON such as {"id": 1, "do": "open", "version": …}; the other requests are
`serve` and `refresh`. The worker answers each request, in any order, with a line that has its id. It also sends events:
`serving`, with facts for the log, and `withdrawn`.
"""

import asyncio
import json
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
        self.metrics: int = given["metrics"]  # the descriptor of the memory for the metrics
        self.gone = asyncio.Event()  # set when the supervisor is gone
        self._channel = socket.socket(fileno=given["channel"])
        self._writer: asyncio.StreamWriter | None = None

    async def follow(self, stop: asyncio.Event, answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> None:
        """Answer the supervisor's requests, each in a task; set `stop` when the supervisor is gone."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._channel, limit=MAX_LINE_BYTES)
        tasks: set[asyncio.Task[None]] = set()

        async def handle(request: dict[str, Any]) -> None:
            self.send({"id": request["id"], **await answer(request)})

        with suppress(OSError):
            while (line := await reader.readline()).endswith(b"\n"):
                tasks.add(task := asyncio.create_task(handle(json.loads(line))))
                task.add_done_callback(tasks.discard)
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
