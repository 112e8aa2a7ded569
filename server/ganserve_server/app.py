"""Puts the server together, runs it, and takes it down without losing a call."""

import asyncio
import functools
import gc
import importlib.metadata
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from ganserve.v1 import administration_pb2_grpc, generation_pb2
from ganserve_server import administration, inference_protocol
from ganserve_server.addresses import StartError, bind, name, refused
from ganserve_server.administration import Administration, AdministrationServicer, OfAllWorkers
from ganserve_server.calls import CallRecorder, tell_tls_failure
from ganserve_server.endpoint import Endpoint
from ganserve_server.engine import ProviderUnavailable
from ganserve_server.grpc_server import Call, GrpcServer
from ganserve_server.inference import grpc_service_pb2
from ganserve_server.inference_protocol import InferenceServicer
from ganserve_server.lifecycle import Lifecycle, ModelTable
from ganserve_server.machine import cores, nvidia_driver
from ganserve_server.metrics import Load, Metrics
from ganserve_server.repository import check_repository
from ganserve_server.security import Security
from ganserve_server.servicer import SERVICE, GenerationServicer
from ganserve_server.settings import ServerSettings
from ganserve_server.systemd import notify, reloading
from ganserve_server.tokens import Buckets
from ganserve_server.tracing import start_tracing
from ganserve_server.workers import WORKER_VARIABLE, Parent, Supervisor

_log = logging.getLogger(__name__)

_MAX_REQUEST_BYTES = 4 << 20  # a thousand latents of a thousand values
_ADMIN_CONNECTIONS = 100


async def serve(settings: ServerSettings, stop: asyncio.Event, reload: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain; whenever `reload` is set, look for changes in the repository.

    Raises:
        StartError: no model can be served, or an address is taken.
    """
    if variable := os.environ.get(WORKER_VARIABLE):
        parent = Parent(variable)
        of_worker = Metrics()
        security = Security(settings, of_worker, Buckets(parent.buckets))
        await _serve_models(settings, stop, reload, parent.sockets, of_worker, security, parent)
        return
    started = time.perf_counter()
    sockets = bind(settings.address, "--address")
    workers = _count_workers(settings)
    metrics = Metrics() if workers == 1 else None
    security = Security(settings, metrics, Buckets())
    security.warn_if_open(sockets, "--address")

    def log_serving(facts: Mapping[str, Any], metrics_address: str | None, admin_address: str | None) -> None:
        _log.info(
            "serving",
            extra={
                "address": name(sockets[0], settings.address),
                "metrics_address": metrics_address,
                "admin_address": admin_address,
                "workers": workers,
                "tls": security.certificates is not None,
                "tokens": security.tokens is not None,
                "start_s": round(time.perf_counter() - started, 3),
                "version": importlib.metadata.version("ganserve"),
                **facts,
            },
        )
        notify("READY=1")

    if metrics is not None:
        endpoint = Endpoint(settings.metrics_address, metrics.registry)
        admin = _AdminServer(settings, security)

        def on_serving(facts: Mapping[str, Any], lifecycle: Lifecycle) -> None:
            log_serving(facts, endpoint.address, admin.start(lifecycle))
            endpoint.why_not_ready = lambda: (
                "draining" if stop.is_set() else "" if lifecycle.serves else "no model is served"
            )

        try:
            await _serve_models(settings, stop, reload, sockets, metrics, security, on_serving=on_serving)
            await admin.stop()
        finally:
            endpoint.close()
    else:
        supervisor = Supervisor(workers, sockets)
        endpoint = Endpoint(settings.metrics_address, supervisor.registry)
        admin = _AdminServer(settings, security)
        try:
            facts = await supervisor.start()
            log_serving(facts, endpoint.address, admin.start(OfAllWorkers(supervisor)))
            endpoint.why_not_ready = lambda: (
                "draining" if stop.is_set() else "" if supervisor.serves else "no model is served"
            )
            tasks = [
                asyncio.create_task(_forward_reloads(reload, supervisor, security)),
                asyncio.create_task(security.watch()),
            ]
            await stop.wait()
            _tell_draining(settings)
            for task in tasks:
                task.cancel()
            await admin.stop()
            await supervisor.stop()
        finally:
            endpoint.close()
            supervisor.close()
    _log.info("stopped")


async def _serve_models(
    settings: ServerSettings,
    stop: asyncio.Event,
    reload: asyncio.Event,
    sockets: list[socket.socket],
    metrics: Metrics,
    security: Security,
    parent: Parent | None = None,
    on_serving: Callable[[Mapping[str, Any], Lifecycle], None] = lambda *_: None,
) -> None:
    """Do all of a server's work that is one process's."""
    board = parent.board if parent else None
    table, health_servicer = ModelTable(), health.aio.HealthServicer()
    lifecycle = Lifecycle(settings, metrics, table, health_servicer, board, parent.unloaded if parent else ())
    await _load_models(lifecycle, settings, table)
    if stop.is_set():
        return
    tracing = start_tracing(tell=parent is None or parent.number == 0)
    recorder = CallRecorder(metrics, settings.access_log, tracing)
    server = GrpcServer(
        on_finished=recorder.finished,
        on_refused=recorder.refused,
        on_tls_failure=recorder.tls_failed,
        on_aged=metrics.connections_aged.inc,
        guard=security.guard("generate"),
        unguarded_services=(health.SERVICE_NAME,),
        tls=security.context,
        max_connection_age_s=settings.max_connection_age_s,
        max_connections=settings.max_connections,
        max_streams=settings.max_calls_per_connection,
        max_request_bytes=_MAX_REQUEST_BYTES,
        # Their watchers would stay for ever.
        unawaited_services=(health.SERVICE_NAME, reflection.SERVICE_NAME),
        board=board,
    )
    if parent is None:
        metrics.registry.register(Load(lambda: server.load))
    GenerationServicer(table, settings, metrics).add_to(server)
    InferenceServicer(table, settings, health_servicer).add_to(server)
    grpcs: Any = server
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, grpcs)
    ours = (SERVICE, inference_protocol.SERVICE)
    if settings.reflection == "on":
        names = (*ours, health.SERVICE_NAME, reflection.SERVICE_NAME)
        add_reflection: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        add_reflection(reflection.aio.ReflectionServicer(names, _reflected()), grpcs)
    for service in ours:
        await health_servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    try:
        server.start(sockets)
    except OSError as error:
        raise refused(settings.address, "--address", error) from error
    tasks = [asyncio.create_task(_refresh_on(reload, lifecycle, security)), asyncio.create_task(security.watch())]
    if settings.reload == "watch":
        tasks.append(asyncio.create_task(lifecycle.watch(stop)))
        await asyncio.sleep(0)  # it watches from here on
        await lifecycle.refresh()  # what changed since the models were loaded
    provider = table.find(table.names[0], None).model.engine.provider
    metrics.provider_info.labels(settings.provider, provider, int(bool(nvidia_driver()))).set(1)
    metrics.queue_limit_images.set(settings.max_queue_images)
    facts = {"models": table.names, "provider": provider}
    # What is there by now stays. To look through it again and again took a fifth of the time of a call.
    gc.collect()
    gc.freeze()
    if parent:
        parent.tell(facts)
        tasks.append(asyncio.create_task(parent.follow(stop, functools.partial(administration.answer, lifecycle))))
    else:
        on_serving(facts, lifecycle)
    await stop.wait()
    if not parent:
        _tell_draining(settings)
    await health_servicer.enter_graceful_shutdown()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(settings.drain_delay_s)
    await server.drain(settings.drain_timeout_s)
    if tracing is not None:
        await tracing.close()
    await lifecycle.close()


class _AdminServer:
    """Answers AdministrationService, if it has an address."""

    def __init__(self, settings: ServerSettings, security: Security) -> None:
        self._settings, self._security = settings, security
        # Before the models are loaded: an address that is taken should be told at once.
        off = settings.admin_address == "off"
        self._sockets = [] if off else bind(settings.admin_address, "--admin-address")
        security.warn_if_open(self._sockets, "--admin-address")
        self._server: GrpcServer | None = None

    def start(self, able: Administration) -> str | None:
        """Listen; return where."""
        if not self._sockets:
            return None
        self._server = server = GrpcServer(
            on_finished=_tell_admin_call,
            on_refused=lambda *_: None,
            on_tls_failure=tell_tls_failure,
            max_connections=_ADMIN_CONNECTIONS,
            max_streams=_ADMIN_CONNECTIONS,
            max_request_bytes=_MAX_REQUEST_BYTES,
            guard=self._security.guard("admin"),
            tls=self._security.context,
        )
        grpcs: Any = server
        administration_pb2_grpc.add_AdministrationServiceServicer_to_server(AdministrationServicer(able), grpcs)
        InferenceServicer(ModelTable(), self._settings, health.aio.HealthServicer(), able).add_to(
            server, administration_alone=True
        )
        try:
            server.start(self._sockets)
        except OSError as error:
            raise refused(self._settings.admin_address, "--admin-address", error) from error
        return name(self._sockets[0], self._settings.admin_address)

    async def stop(self) -> None:
        """Finish what was begun, and close."""
        if self._server is not None:
            await self._server.drain(self._settings.drain_timeout_s)


def _tell_draining(settings: ServerSettings) -> None:
    notify("STOPPING=1")
    _log.info("draining", extra={"drain_delay_s": settings.drain_delay_s})


def _tell_admin_call(call: Call, code: grpc.StatusCode, text: str) -> None:
    """Log every one: who did what to the models."""
    told = {
        "method": call.head.path.rpartition("/")[2],
        "model": call.model,
        "code": code.name,
        "caller": call.caller.name if call.caller else None,
        "peer": call.peer,
        "request_id": call.request_id,
        "reason": text,
    }
    _log.info("admin call", extra={key: value for key, value in told.items() if value})


def _count_workers(settings: ServerSettings) -> int:
    """Decide how many processes serve."""
    if settings.workers != "auto":
        return int(settings.workers)
    if settings.provider != "cpu" and nvidia_driver():
        return 1  # each would keep every model on the GPU
    # On two cores one process makes more images of a large model than two, and fewer of a small one by single calls, in
    # half the memory. With more cores its one thread that reads and writes becomes the limit; a quarter is a guess.
    usable = cores().usable
    return max(1, min(settings.threads or usable, usable) // 4)


async def _forward_reloads(reload: asyncio.Event, supervisor: Supervisor, security: Security) -> None:
    while True:
        await reload.wait()
        reload.clear()
        with reloading():
            security.refresh()
            supervisor.signal(signal.SIGHUP)


async def _load_models(lifecycle: Lifecycle, settings: ServerSettings, table: ModelTable) -> None:
    check_repository(settings.models)
    try:
        await lifecycle.refresh(starting=True)
    except ProviderUnavailable as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"the model repository {settings.models} cannot be listed: {error.strerror}") from error
    if not table.names:
        raise StartError(f"{settings.models} has no model that can be served: the log has the reason of each")


def _reflected() -> DescriptorPool:
    """Return the files of all services in one pool; those of the Open Inference Protocol are not in the usual one."""
    pool: Any = DescriptorPool()

    def add(file: FileDescriptor) -> None:
        for needed in file.dependencies:
            add(needed)
        pool.AddSerializedFile(file.serialized_pb)

    for module in (generation_pb2, grpc_service_pb2, health_pb2, reflection_pb2):
        add(module.DESCRIPTOR)
    return cast(DescriptorPool, pool)


async def _refresh_on(reload: asyncio.Event, lifecycle: Lifecycle, security: Security) -> None:
    while True:
        await reload.wait()
        reload.clear()
        with reloading():
            security.refresh()
            await lifecycle.refresh()


def handle_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, reload: asyncio.Event) -> None:
    """Set `stop` on SIGTERM and SIGINT, of which a second one ends the process at once, and `reload` on SIGHUP."""

    def begin(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin, number)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
