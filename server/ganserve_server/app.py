"""Puts the server together, runs it, and takes it down without losing a call."""

import asyncio
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from ganserve.v1 import generation_pb2 as pb
from ganserve.v1 import generation_pb2_grpc as pb_grpc
from ganserve_server.engine import ProviderUnavailable
from ganserve_server.interceptor import CallInterceptor
from ganserve_server.lifecycle import Lifecycle, ModelTable
from ganserve_server.metrics import Metrics
from ganserve_server.servicer import GenerationServicer
from ganserve_server.settings import ServerSettings

_log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
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
    interceptor = CallInterceptor(SERVICE, table, metrics, settings.access_log)
    server = grpc.aio.server(
        interceptors=[interceptor],
        options=(
            # Without this two servers share one port in silence.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES),
            ("grpc.max_send_message_length", -1),
        ),
    )
    pb_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(table, settings, metrics), server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = _bind(server, settings.address)
    metrics_address, stop_metrics = _serve_metrics(settings.metrics_address, metrics)
    try:
        await health_servicer.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        tasks = [asyncio.create_task(_refresh_on(reload, lifecycle))]
        if settings.reload == "watch":
            tasks.append(asyncio.create_task(lifecycle.watch(stop)))
        _log.info(
            "serving",
            extra={
                "address": address,
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
        if running := await interceptor.drain(settings.drain_timeout_s):
            _log.warning("calls cut off", extra={"calls": running, "drain_timeout_s": settings.drain_timeout_s})
        # Nothing is left but watchers of the health, who would stay for ever.
        await server.stop(0)
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


def _bind(server: grpc.aio.Server, address: str) -> str:
    host, _ = _split(address, "--address")
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(
            f"cannot listen on {address}: is it in use, or not an address of this machine? (--address)"
        ) from error
    return f"{host}:{port}"


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
