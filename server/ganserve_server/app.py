"""Puts the server together, runs it, and takes it down without losing a call."""

import asyncio
import importlib.metadata
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, cast

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from prometheus_client import start_http_server

from ganserve.v1 import generation_pb2
from ganserve_server import inference_protocol
from ganserve_server.calls import CallRecorder
from ganserve_server.engine import ProviderUnavailable
from ganserve_server.grpc_server import GrpcServer
from ganserve_server.inference import grpc_service_pb2
from ganserve_server.inference_protocol import InferenceServicer
from ganserve_server.lifecycle import Lifecycle, ModelTable
from ganserve_server.metrics import Metrics
from ganserve_server.servicer import SERVICE, GenerationServicer
from ganserve_server.settings import ServerSettings

_log = logging.getLogger(__name__)

_MAX_REQUEST_BYTES = 4 << 20  # a thousand latents of a thousand values


class StartError(Exception):
    """The server cannot start; the text says why and what to do."""


async def serve(settings: ServerSettings, stop: asyncio.Event, reload: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain; whenever `reload` is set, look for changes in the repository.

    Raises:
        StartError: no model can be served, or an address is taken.
    """
    started = time.perf_counter()
    metrics = Metrics()
    table, health_servicer = ModelTable(), health.aio.HealthServicer()
    lifecycle = Lifecycle(settings, metrics, table, health_servicer)
    await _load_models(lifecycle, settings, table)
    if stop.is_set():
        return
    recorder = CallRecorder(metrics, settings.access_log)
    server = GrpcServer(
        on_finished=recorder.finished,
        on_refused=recorder.refused,
        max_connections=settings.max_connections,
        max_streams=settings.max_calls_per_connection,
        max_request_bytes=_MAX_REQUEST_BYTES,
        # Their watchers would stay for ever.
        unawaited_services=(health.SERVICE_NAME, reflection.SERVICE_NAME),
    )
    GenerationServicer(table, settings, metrics).add_to(server)
    InferenceServicer(table, settings, health_servicer).add_to(server)
    grpcs: Any = server
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, grpcs)
    ours = (SERVICE, inference_protocol.SERVICE)
    names = (*ours, health.SERVICE_NAME, reflection.SERVICE_NAME)
    add_reflection: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
    add_reflection(reflection.aio.ReflectionServicer(names, _reflected()), grpcs)
    sockets = _listen(settings.address)
    metrics_address, stop_metrics = _serve_metrics(settings.metrics_address, metrics)
    try:
        for name in ours:
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start(sockets)
        tasks = [asyncio.create_task(_refresh_on(reload, lifecycle))]
        if settings.reload == "watch":
            tasks.append(asyncio.create_task(lifecycle.watch(stop)))
        _log.info(
            "serving",
            extra={
                "address": _name(sockets[0], settings.address),
                "metrics_address": metrics_address,
                "models": table.names,
                "provider": table.find(table.names[0], None).model.engine.provider,
                "start_s": round(time.perf_counter() - started, 3),
                "version": importlib.metadata.version("ganserve"),
            },
        )
        await stop.wait()
        _log.info("draining", extra={"drain_delay_s": settings.drain_delay_s})
        await health_servicer.enter_graceful_shutdown()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(settings.drain_delay_s)
        await server.drain(settings.drain_timeout_s)
        await lifecycle.close()
    finally:
        stop_metrics()
    _log.info("stopped")


async def _load_models(lifecycle: Lifecycle, settings: ServerSettings, table: ModelTable) -> None:
    if not settings.models.is_dir():
        raise StartError(f"the model repository {settings.models} is not a folder; give one by --models")
    try:
        await lifecycle.refresh(starting=True)
    except ProviderUnavailable as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"the model repository {settings.models} cannot be listed: {error.strerror}") from error
    if not table.names:
        raise StartError(
            f"{settings.models} has no model that can be served; expected MODELS/NAME/VERSION/model.onnx, "
            "as `ganserve-trainer export` writes it"
        )


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


async def _refresh_on(reload: asyncio.Event, lifecycle: Lifecycle) -> None:
    while True:
        await reload.wait()
        reload.clear()
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


def _listen(address: str) -> list[socket.socket]:
    """Bind an address: all that its name stands for."""
    host, port = _split(address, "--address")
    sockets: list[socket.socket] = []
    try:
        for family, kind, _, _, place in socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            # A port of the system's choice is one port.
            if port == 0 and sockets:
                break
            both = family == socket.AF_INET6 and place[0] == "::" and socket.has_dualstack_ipv6()
            sockets.append(socket.create_server(place[:2], family=family, backlog=1024, dualstack_ipv6=both))
            assert kind == socket.SOCK_STREAM
    except OSError as error:
        raise StartError(
            f"cannot listen on {address}: {error.strerror}; is it in use, or not one of this machine? (--address)"
        ) from error
    return sockets


def _name(listening: socket.socket, address: str) -> str:
    return f"{address.rpartition(':')[0]}:{listening.getsockname()[1]}"


def _serve_metrics(address: str, metrics: Metrics) -> tuple[str | None, Callable[[], None]]:
    """Start the Prometheus endpoint; return its address and what stops it."""
    if address == "off":
        return None, lambda: None
    host, port = _split(address, "--metrics-address")
    try:
        http, thread = start_http_server(port, host.strip("[]"), metrics.registry)
    except (OSError, UnicodeError) as error:
        raise StartError(f"cannot listen on {address}: {error} (--metrics-address, 'off' for none)") from error

    def stop() -> None:
        http.shutdown()
        http.server_close()
        thread.join()

    return f"{host}:{http.server_port}", stop


def _split(address: str, flag: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise StartError(f"{flag} is {address!r}; it must be HOST:PORT, such as 127.0.0.1:50051 or [::]:50051")
    return host, int(port)
