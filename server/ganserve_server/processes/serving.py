"""The work of one process: its models, their queues, and the calls it answers."""

import asyncio
import dataclasses
import functools
import gc
import logging
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

from ganserve.v1 import generation_pb2
from ganserve_server.auth.security import Security
from ganserve_server.compute.cuda import nvidia_driver
from ganserve_server.inference import grpc_service_pb2
from ganserve_server.machine import free_descriptors
from ganserve_server.observe.call_recorder import CallRecorder
from ganserve_server.observe.metrics import Metrics
from ganserve_server.observe.tracing import start_tracing
from ganserve_server.repository.served import ServedVersions
from ganserve_server.repository.state_folder import StateFolder
from ganserve_server.repository.table import ModelTable
from ganserve_server.services import health, open_inference, reflection
from ganserve_server.services.generation import SERVICE, GenerationServicer
from ganserve_server.services.open_inference import InferenceServicer
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.scoreboard import Scoreboard
from ganserve_server.transport import new_server
from ganserve_server.transport.addresses import refused
from ganserve_server.transport.interface import Server
from ganserve_server.transport.limits import Limits, connections_within

_log = logging.getLogger(__name__)

# With Python's default of 5 ms, a computing thread would wait 5 ms for the GIL at each step of its batch while a burst
# of frames keeps the event loop busy.
_SWITCH_INTERVAL_S = 0.001
# Of a process that ends because a thread does not come back from a batch, so that another process takes its place:
# EX_SOFTWARE of sysexits.h.
LOST_THREAD_STATUS = 70
_LONGEST_CLOSE_S = 2.0  # less than a supervisor waits for a worker


class Host(ABC):
    """The process that serves the models: the server's only process, or one of several workers.

    Attributes:
        sockets: the bound sockets for calls.
        metrics: the metrics of this process.
        security: the certificates and tokens of this process.
        board: the workers' scoreboard, if there are several workers.
        state: what is known of model files.
        logs: whether this process logs the lines that are identical in all workers.
    """

    sockets: list[socket.socket]
    metrics: Metrics
    security: Security
    board: Scoreboard | None
    state: StateFolder
    logs: bool

    @abstractmethod
    async def load(self, versions: ServedVersions) -> None:
        """Open the models and serve them; return when that is done.

        Raises:
            StartError: no model can be served, or the required provider is missing.
        """

    @abstractmethod
    def withdrawn(self, name: str, version: int, digest: str, reason: str) -> None:
        """Report that this process took a version out of service, which the others must do, too."""

    @abstractmethod
    def server_made(self, server: Server) -> None:
        """Called with the server before it listens."""

    @abstractmethod
    def serving(self, facts: dict[str, Any]) -> None:
        """Called when the server answers calls: report that."""

    @abstractmethod
    def thread_lost(self, on_cpu: bool) -> None:
        """Called when a computing thread does not come back; another one has its place, unless it computed on a GPU."""

    @abstractmethod
    def draining(self) -> None:
        """Called when the drain begins: report that."""

    @abstractmethod
    async def wait_for_drain(self) -> None:
        """Keep serving until load balancers have noticed that this server is not ready."""

    @abstractmethod
    async def drained(self) -> None:
        """Called when all calls are done: serve no other models any more."""


async def serve_models(host: Host, settings: ServerSettings, stop: asyncio.Event) -> None:
    """Serve the models of one process until `stop` is set, then drain.

    Args:
        host: the process.
        settings: the server's settings.
        stop: when set, ends the serving.

    Raises:
        StartError: no model can be served, or the address is taken.
    """
    metrics, security, board = host.metrics, host.security, host.board
    table, health_servicer = ModelTable(), health.HealthServicer()
    versions = ServedVersions(
        settings,
        metrics,
        table,
        health_servicer.set_serving,
        host.withdrawn,
        host.thread_lost,
        host.state.risk(),
        board,
    )
    await _until(stop, host.load(versions))
    if stop.is_set():
        return
    tracing = start_tracing(warn=host.logs)
    limits = _limits(settings, warn=host.logs)
    recorder = CallRecorder(metrics, settings.access_log, tracing)
    server = new_server(
        settings.transport,
        security,
        on_finished=recorder.finished,
        on_refused=recorder.refused,
        on_internal_error=recorder.internal_error,
        on_tls_failure=recorder.tls_failed,
        on_aged=metrics.connections_aged.inc,
        on_turned_away=functools.partial(_turned_away, metrics, few=limits.max_connections < settings.max_connections),
        guard=security.guard("generate"),
        on_ended=recorder.connection_ended,
        limits=limits,
        board=board,
    )
    host.server_made(server)
    _add_services(server, settings, metrics, table, health_servicer)
    if board is not None:
        await board.all_loaded()
    try:
        server.start(host.sockets)
    except OSError as error:
        raise refused(settings.address, "--address", error) from error
    watching = asyncio.create_task(security.watch())
    provider = table.find(table.names[0], None).model.engine.provider if table.names else ""
    if provider:
        metrics.provider_info.labels(settings.provider, provider, int(bool(nvidia_driver()))).set(1)
    metrics.queue_limit_images.set(settings.max_queue_images)
    # The objects that exist by now stay. When the garbage collector scanned them repeatedly, that took a fifth of a
    # call's time.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    host.serving({"models": table.names, "provider": provider})
    await stop.wait()
    host.draining()
    health_servicer.enter_graceful_shutdown()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await host.wait_for_drain()
    await server.drain(settings.drain_timeout_s)
    await host.drained()
    recorder.close()
    if tracing is not None:
        await tracing.close()
    try:
        await asyncio.wait_for(versions.close(), _LONGEST_CLOSE_S)
    except TimeoutError:
        _log.warning("batches do not end; the server ends without them", extra={"timeout_s": _LONGEST_CLOSE_S})


def _add_services(
    server: Server,
    settings: ServerSettings,
    metrics: Metrics,
    table: ModelTable,
    health_servicer: health.HealthServicer,
) -> None:
    GenerationServicer(table, settings, metrics).add_to(server)
    InferenceServicer(table, settings, health_servicer).add_to(server)
    health_servicer.add_to(server)
    ours = (SERVICE, open_inference.SERVICE)
    if settings.reflection == "on":
        files = (generation_pb2.DESCRIPTOR, grpc_service_pb2.DESCRIPTOR, health.DESCRIPTOR)
        reflection.ReflectionServicer((*ours, health.SERVICE), files).add_to(server)
    for service in ours:
        health_servicer.set(service, health.SERVING)


def _limits(settings: ServerSettings, *, warn: bool) -> Limits:
    """Return the limits of the transport, with fewer connections if there are too few file descriptors."""
    fitting = connections_within(free_descriptors())
    if fitting >= settings.max_connections:
        return settings.limits
    if warn:
        _log.warning(
            "there are too few file descriptors for --max-connections; raise the limit on open files",
            extra={"max_connections": settings.max_connections, "connections": fitting},
        )
    return dataclasses.replace(settings.limits, max_connections=fitting)


def _turned_away(metrics: Metrics, reason: str, *, few: bool) -> None:
    metrics.connections_turned_away.labels("descriptors" if few else reason).inc()


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do some work, but not once `stop` is set."""
    working, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    await asyncio.wait((working, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not working.done():
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        return
    await working
