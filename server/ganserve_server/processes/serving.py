"""The work of one process: its models, their queues, and the calls it answers."""

import asyncio
import gc
import logging
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

from ganserve.v1 import generation_pb2
from ganserve_server.auth.security import Security
from ganserve_server.compute.cuda import nvidia_driver
from ganserve_server.compute.engine import ProviderUnavailable
from ganserve_server.inference import grpc_service_pb2
from ganserve_server.observe.call_recorder import CallRecorder
from ganserve_server.observe.metrics import Metrics
from ganserve_server.observe.tracing import start_tracing
from ganserve_server.processes.systemd import reloading
from ganserve_server.repository.lifecycle import Lifecycle
from ganserve_server.repository.scan import require_models
from ganserve_server.repository.table import ModelTable
from ganserve_server.services import health, open_inference, reflection
from ganserve_server.services.generation import SERVICE, GenerationServicer
from ganserve_server.services.open_inference import InferenceServicer
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.scoreboard import Scoreboard
from ganserve_server.start_errors import StartError
from ganserve_server.transport import new_server
from ganserve_server.transport.addresses import refused
from ganserve_server.transport.interface import Server

_log = logging.getLogger(__name__)

# With Python's default of 5 ms, a computing thread would wait 5 ms for the GIL at each step of its batch while a burst
# of frames keeps the event loop busy.
_SWITCH_INTERVAL_S = 0.001


class Host(ABC):
    """The process that serves the models: the server's only process, or one of several workers.

    Attributes:
        sockets: the bound sockets for calls.
        metrics: the metrics of this process.
        security: the certificates and tokens of this process.
        board: the workers' scoreboard, if there are several workers.
        unloaded: models that an operator has unloaded.
        may_be_empty: whether to serve even without a model.
        logs: whether this process logs the lines that are identical in all workers.
    """

    sockets: list[socket.socket]
    metrics: Metrics
    security: Security
    board: Scoreboard | None
    unloaded: Collection[str]
    may_be_empty: bool
    logs: bool

    @abstractmethod
    def server_made(self, server: Server) -> None:
        """Called with the server before it listens."""

    @abstractmethod
    def serving(self, facts: dict[str, Any], lifecycle: Lifecycle) -> None:
        """Called when the server answers calls: report that, and accept operators' requests."""

    @abstractmethod
    def draining(self) -> None:
        """Called when the drain begins: report that."""

    @abstractmethod
    async def wait_for_drain(self) -> None:
        """Keep serving until load balancers have noticed that this server is not ready."""

    @abstractmethod
    async def drained(self) -> None:
        """Called when all calls are done: accept no more requests from operators."""


async def serve_models(host: Host, settings: ServerSettings, stop: asyncio.Event, reload: asyncio.Event) -> None:
    """Serve the models of one process until `stop` is set, then drain.

    Args:
        host: the process.
        settings: the server's settings.
        stop: when set, ends the serving.
        reload: when set, looks for changes in the repository.

    Raises:
        StartError: no model can be served, or the address is taken.
    """
    metrics, security, board = host.metrics, host.security, host.board
    table, health_servicer = ModelTable(), health.HealthServicer()
    lifecycle = Lifecycle(settings, metrics, table, health_servicer.set_serving, board, host.unloaded)
    await _load_models(lifecycle, settings, table, may_be_empty=host.may_be_empty)
    if stop.is_set():
        return
    tracing = start_tracing(warn=host.logs)
    recorder = CallRecorder(metrics, settings.access_log, tracing)
    server = new_server(
        settings.transport,
        security,
        on_finished=recorder.finished,
        on_refused=recorder.refused,
        on_internal_error=recorder.internal_error,
        on_tls_failure=recorder.tls_failed,
        on_aged=metrics.connections_aged.inc,
        on_turned_away=metrics.connections_turned_away.inc,
        guard=security.guard("generate"),
        on_ended=recorder.connection_ended,
        limits=settings.limits,
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
    tasks = [asyncio.create_task(_refresh_on(reload, lifecycle, security)), asyncio.create_task(security.watch())]
    if settings.reload == "watch":
        tasks.append(asyncio.create_task(lifecycle.watch(stop)))
        await asyncio.sleep(0)  # so that the watch begins
        await lifecycle.refresh()  # for changes since the models were loaded
    provider = table.find(table.names[0], None).model.engine.provider if table.names else ""
    if provider:
        metrics.provider_info.labels(settings.provider, provider, int(bool(nvidia_driver()))).set(1)
    metrics.queue_limit_images.set(settings.max_queue_images)
    # The objects that exist by now stay. When the garbage collector scanned them repeatedly, that took a fifth of a
    # call's time.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    host.serving({"models": table.names, "provider": provider}, lifecycle)
    await stop.wait()
    host.draining()
    health_servicer.enter_graceful_shutdown()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await host.wait_for_drain()
    await server.drain(settings.drain_timeout_s)
    await host.drained()
    recorder.close()
    if tracing is not None:
        await tracing.close()
    await lifecycle.close()


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


async def _load_models(
    lifecycle: Lifecycle, settings: ServerSettings, table: ModelTable, *, may_be_empty: bool
) -> None:
    if not may_be_empty:
        require_models(settings.models)
    try:
        await lifecycle.refresh(starting=True)
    except ProviderUnavailable as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"the model repository {settings.models} cannot be listed: {error.strerror}") from error
    if not table.names and not may_be_empty:
        raise StartError(f"{settings.models} has no model that can be served: the log has the reason for each file")


async def _refresh_on(reload: asyncio.Event, lifecycle: Lifecycle, security: Security) -> None:
    while True:
        await reload.wait()
        reload.clear()
        with reloading():
            security.refresh()
            await lifecycle.refresh()
        _log.info("reloaded")
