"""One process's work: its models, their queues, and the calls it answers."""

import asyncio
import contextlib
import functools
import gc
import logging
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ganserve.v1 import generation_pb2
from ganserve_server.auth.security import Security
from ganserve_server.compute.cuda import nvidia_driver
from ganserve_server.compute.engine import ProviderUnavailable
from ganserve_server.inference import grpc_service_pb2
from ganserve_server.observe.call_recorder import CallRecorder
from ganserve_server.observe.metrics import Load, Metrics
from ganserve_server.observe.tracing import start_tracing
from ganserve_server.processes import administration
from ganserve_server.processes.supervisor import Parent
from ganserve_server.processes.systemd import reloading
from ganserve_server.repository.lifecycle import Lifecycle
from ganserve_server.repository.scan import require_models
from ganserve_server.repository.table import ModelTable
from ganserve_server.services import health, open_inference, reflection
from ganserve_server.services.generation import SERVICE, GenerationServicer
from ganserve_server.services.open_inference import InferenceServicer
from ganserve_server.settings import ServerSettings
from ganserve_server.start_errors import StartError
from ganserve_server.transport import new_server
from ganserve_server.transport.addresses import refused

_log = logging.getLogger(__name__)

# Python's 5 ms would be waited for at each step of a batch whose thread needs the interpreter while a burst of frames
# keeps the event loop busy.
_SWITCH_INTERVAL_S = 0.001


async def serve_models(
    settings: ServerSettings,
    stop: asyncio.Event,
    reload: asyncio.Event,
    sockets: list[socket.socket],
    metrics: Metrics,
    security: Security,
    parent: Parent | None = None,
    on_serving: Callable[[Mapping[str, Any], Lifecycle], None] = lambda *_: None,
    on_draining: Callable[[], None] = lambda: None,
) -> None:
    """Do all of a server's work that is one process's, until `stop` is set; then drain.

    Raises:
        StartError: no model can be served, or the address is taken.
    """
    board = parent.board if parent else None
    table, health_servicer = ModelTable(), health.HealthServicer()
    lifecycle = Lifecycle(
        settings, metrics, table, health_servicer.set_serving, board, parent.unloaded if parent else ()
    )
    # A worker that replaces one goes on as the others do, though they may have no model by now.
    await _load_models(lifecycle, settings, table, may_be_none=parent is not None and parent.replaces)
    if stop.is_set():
        return
    tracing = start_tracing(tell=parent is None or parent.number == 0)
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
        on_ended=lambda reason: metrics.connections_ended.labels(reason).inc(),
        limits=settings.limits,
        # Their watchers would stay for ever.
        unawaited_services=reflection.SERVICES,
        board=board,
    )
    if parent is None:
        metrics.registry.register(Load(lambda: server.load, server.kept_bytes))
    GenerationServicer(table, settings, metrics).add_to(server)
    InferenceServicer(table, settings, health_servicer).add_to(server)
    health_servicer.add_to(server)
    ours = (SERVICE, open_inference.SERVICE)
    if settings.reflection == "on":
        files = (generation_pb2.DESCRIPTOR, grpc_service_pb2.DESCRIPTOR, health.DESCRIPTOR)
        reflection.ReflectionServicer((*ours, health.SERVICE), files).add_to(server)
    for service in ours:
        health_servicer.set(service, health.SERVING)
    if board is not None:
        await board.all_loaded()
    try:
        server.start(sockets)
    except OSError as error:
        raise refused(settings.address, "--address", error) from error
    tasks = [asyncio.create_task(_refresh_on(reload, lifecycle, security)), asyncio.create_task(security.watch())]
    if settings.reload == "watch":
        tasks.append(asyncio.create_task(lifecycle.watch(stop)))
        await asyncio.sleep(0)  # it watches from here on
        await lifecycle.refresh()  # what changed since the models were loaded
    provider = table.find(table.names[0], None).model.engine.provider if table.names else ""
    if provider:
        metrics.provider_info.labels(settings.provider, provider, int(bool(nvidia_driver()))).set(1)
    metrics.queue_limit_images.set(settings.max_queue_images)
    facts = {"models": table.names, "provider": provider}
    # What is there by now stays. To look through it again and again took a fifth of the time of a call.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if parent:
        parent.tell(facts)
        following = asyncio.create_task(parent.follow(stop, functools.partial(_answer, lifecycle, security)))
    else:
        on_serving(facts, lifecycle)
    await stop.wait()
    on_draining()
    health_servicer.enter_graceful_shutdown()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if parent is None:
        await asyncio.sleep(settings.drain_delay_s)
    else:
        with contextlib.suppress(TimeoutError):  # without it the address is to be free at once, for the next server
            await asyncio.wait_for(parent.gone.wait(), settings.drain_delay_s)
    await server.drain(settings.drain_timeout_s)
    if parent is not None:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    recorder.close()
    if tracing is not None:
        await tracing.close()
    await lifecycle.close()


async def _load_models(lifecycle: Lifecycle, settings: ServerSettings, table: ModelTable, *, may_be_none: bool) -> None:
    if not may_be_none:
        require_models(settings.models)
    try:
        await lifecycle.refresh(starting=True)
    except ProviderUnavailable as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"the model repository {settings.models} cannot be listed: {error.strerror}") from error
    if not table.names and not may_be_none:
        raise StartError(f"{settings.models} has no model that can be served: the log has the reason of each")


async def _answer(lifecycle: Lifecycle, security: Security, request: dict[str, Any]) -> dict[str, Any]:
    """Do what the supervisor asks."""
    if request["do"] == "refresh":  # as on SIGHUP
        security.refresh()
    return await administration.answer(lifecycle, request)


async def _refresh_on(reload: asyncio.Event, lifecycle: Lifecycle, security: Security) -> None:
    while True:
        await reload.wait()
        reload.clear()
        with reloading():
            security.refresh()
            await lifecycle.refresh()
        _log.info("reloaded")
