"""Starts the server, as one process or as several, and takes it down without losing a call."""

import asyncio
import contextlib
import importlib
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from socket import socket
from typing import TYPE_CHECKING, Any

from ganserve_server.auth.security import Security
from ganserve_server.compute.cuda import nvidia_driver
from ganserve_server.machine import cores, memory_limit
from ganserve_server.observe.http_endpoint import Endpoint
from ganserve_server.observe.metrics import Metrics
from ganserve_server.processes.admin_listener import AdminServer
from ganserve_server.processes.administration import WorkersAdministration
from ganserve_server.processes.supervisor import WORKER_VARIABLE, Parent, Supervisor
from ganserve_server.processes.systemd import notify, reloading
from ganserve_server.settings import ServerSettings
from ganserve_server.shared.rates import SharedRates
from ganserve_server.start_errors import StartError
from ganserve_server.transport.addresses import bind, name

# What takes long to import, onnxruntime above all, is imported where a process needs it: a supervisor does not, and it
# starts the workers first.
if TYPE_CHECKING:
    from ganserve_server.repository.lifecycle import Lifecycle

_log = logging.getLogger(__name__)

LogServing = Callable[[Mapping[str, Any], str | None, str | None], None]

# What a worker takes with no model, and with each byte of a model's file; half as much again as was measured.
_WORKER_BYTES, _BYTES_PER_FILE_BYTE = 140 << 20, 3
_NO_LIMIT = 1 << 60  # of bytes
_LONGEST_END_S = 5.0  # what a worker may take beside the drain
_ALIKE = ("model loaded", "model unloaded", "model kept out")


async def serve(settings: ServerSettings, stop: asyncio.Event, reload: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain; whenever `reload` is set, look for changes in the repository.

    Raises:
        StartError: no model can be served, or an address is taken.
    """
    if variable := os.environ.get(WORKER_VARIABLE):
        await _work(Parent(variable), settings, stop, reload)
        return
    started = time.perf_counter()
    sockets = bind(settings.address, "--address")
    workers = _count_workers(settings)

    def log_serving(facts: Mapping[str, Any], metrics_address: str | None, admin_address: str | None) -> None:
        _log.info(
            "serving",
            extra={
                "address": name(sockets[0], settings.address),
                "metrics_address": metrics_address,
                "admin_address": admin_address,
                "transport": settings.transport,
                "workers": workers,
                "tls": security.certificates is not None,
                "tokens": security.tokens is not None,
                "start_s": round(time.perf_counter() - started, 3),
                "version": importlib.metadata.version("ganserve"),
                **facts,
            },
        )
        notify("READY=1")

    metrics = Metrics() if workers == 1 else None
    security = Security(settings, metrics, SharedRates())
    security.warn_if_open(sockets, "--address")
    if metrics is not None:
        await _serve_alone(settings, stop, reload, sockets, metrics, security, log_serving)
    else:
        await _supervise(settings, stop, reload, Supervisor(workers, sockets), security, log_serving)
    _log.info("stopped")


async def _work(parent: Parent, settings: ServerSettings, stop: asyncio.Event, reload: asyncio.Event) -> None:
    """Be one of several workers."""
    from ganserve_server.processes.worker import serve_models

    metrics = Metrics()
    # What all workers see alike is told once: of certificates and tokens by the supervisor, of models by one worker.
    logging.getLogger("ganserve_server.auth.security").setLevel(logging.CRITICAL)
    models_log = logging.getLogger("ganserve_server.repository.lifecycle")
    models_log.addFilter(lambda line: line.msg not in _ALIKE or parent.tells)
    security = Security(settings, metrics, SharedRates(parent.rates))
    with contextlib.closing(parent):
        try:
            await serve_models(settings, stop, reload, parent.sockets, metrics, security, parent)
        except StartError as error:
            if parent.tells:
                raise
            raise SystemExit(1) from error


async def _serve_alone(
    settings: ServerSettings,
    stop: asyncio.Event,
    reload: asyncio.Event,
    sockets: list[socket],
    metrics: Metrics,
    security: Security,
    log_serving: LogServing,
) -> None:
    """Be all there is of the server."""
    from ganserve_server.processes.worker import serve_models

    with contextlib.closing(Endpoint(settings.metrics_address, metrics.registry)) as endpoint:
        admin = AdminServer(settings, security)

        def on_serving(facts: Mapping[str, Any], lifecycle: "Lifecycle") -> None:
            log_serving(facts, endpoint.address, admin.start(lifecycle))
            endpoint.why_not_ready = lambda: _why_not_ready(stop, lifecycle)

        await serve_models(
            settings,
            stop,
            reload,
            sockets,
            metrics,
            security,
            on_serving=on_serving,
            on_draining=lambda: _tell_draining(settings),
        )
        await admin.stop()


async def _supervise(
    settings: ServerSettings,
    stop: asyncio.Event,
    reload: asyncio.Event,
    supervisor: Supervisor,
    security: Security,
    log_serving: LogServing,
) -> None:
    """Have several workers serve."""
    with (
        contextlib.closing(supervisor),
        contextlib.closing(Endpoint(settings.metrics_address, supervisor.registry)) as endpoint,
    ):
        admin = AdminServer(settings, security)
        meanwhile = asyncio.to_thread(importlib.import_module, "ganserve_server.services.administration")
        starting = asyncio.gather(supervisor.start(), meanwhile)
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return  # nobody was served yet
        facts, _ = starting.result()
        if facts is None:
            raise SystemExit(1)
        log_serving(facts, endpoint.address, admin.start(WorkersAdministration(supervisor)))
        endpoint.why_not_ready = lambda: _why_not_ready(stop, supervisor)
        tasks = [
            asyncio.create_task(_forward_reloads(reload, supervisor, security)),
            asyncio.create_task(security.watch()),
        ]
        await stopped
        _tell_draining(settings)
        for task in tasks:
            task.cancel()
        most_s = settings.drain_delay_s + settings.drain_timeout_s + _LONGEST_END_S
        await asyncio.gather(admin.stop(), supervisor.stop(most_s))


def _why_not_ready(stop: asyncio.Event, server: "Supervisor | Lifecycle") -> str:
    return "draining" if stop.is_set() else "" if server.serves else "no model is served"


def _tell_draining(settings: ServerSettings) -> None:
    notify("STOPPING=1")
    _log.info("draining", extra={"drain_delay_s": settings.drain_delay_s})


def _count_workers(settings: ServerSettings) -> int:
    """Decide how many processes serve."""
    if settings.workers != "auto":
        return int(settings.workers)
    if settings.provider != "cpu" and nvidia_driver():
        return 1  # each would keep every model on the GPU
    # On two cores one process makes as many images of a large model as two, in less than half the memory. With more
    # cores its one thread that reads and writes becomes the limit; a quarter is a guess.
    usable = cores().usable
    wanted = min(settings.threads or usable, usable) // 4
    # Large models, which one process computes as fast, are not to take several times their memory where it is short.
    files = 0
    with contextlib.suppress(OSError):  # what cannot be read is told where it is loaded
        for file in settings.models.glob("*/*/*.onnx"):
            with contextlib.suppress(OSError):
                files += file.stat().st_size
    memory = min(memory_limit() or _NO_LIMIT, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    fitting = memory * 3 // 4 // (_WORKER_BYTES + _BYTES_PER_FILE_BYTE * files)
    return max(1, min(wanted, fitting))


async def _forward_reloads(reload: asyncio.Event, supervisor: Supervisor, security: Security) -> None:
    while True:
        await reload.wait()
        reload.clear()
        with reloading():
            security.refresh()
            await supervisor.ask_all({"do": "refresh"})
        _log.info("reloaded")


def handle_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, reload: asyncio.Event) -> None:
    """Set `stop` on SIGTERM and SIGINT, of which a second one ends the process at once, and `reload` on SIGHUP."""

    def begin(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin, number)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
