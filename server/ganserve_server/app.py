"""Starts the server, as one process or as several, and takes it down without losing a call."""

import asyncio
import contextlib
import importlib
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ganserve_server.addresses import StartError, bind, name
from ganserve_server.admin_server import AdminServer
from ganserve_server.endpoint import Endpoint
from ganserve_server.machine import cores, memory_limit, nvidia_driver
from ganserve_server.metrics import Metrics
from ganserve_server.security import Security
from ganserve_server.settings import ServerSettings
from ganserve_server.systemd import notify, reloading
from ganserve_server.tokens import Buckets
from ganserve_server.workers import WORKER_VARIABLE, Parent, Supervisor

# What takes long to import, onnxruntime above all, is imported where a process needs it: a supervisor does not, and it
# starts the workers first.
if TYPE_CHECKING:
    from ganserve_server.lifecycle import Lifecycle

_log = logging.getLogger(__name__)

# What a worker takes with no model, and with each byte of a model's file; half as much again as was measured.
_WORKER_BYTES, _BYTES_PER_FILE_BYTE = 140 << 20, 3
_ALIKE = ("model loaded", "model unloaded", "model kept out")


async def serve(settings: ServerSettings, stop: asyncio.Event, reload: asyncio.Event) -> None:
    """Serve until `stop` is set, then drain; whenever `reload` is set, look for changes in the repository.

    Raises:
        StartError: no model can be served, or an address is taken.
    """
    if variable := os.environ.get(WORKER_VARIABLE):
        from ganserve_server.process import serve_models

        parent = Parent(variable)
        of_worker = Metrics()
        # What all workers see alike is told once: of certificates and tokens by the supervisor, of models by the first.
        logging.getLogger("ganserve_server.security").setLevel(logging.CRITICAL)
        if parent.number:
            for module in ("lifecycle", "repository"):
                logging.getLogger(f"ganserve_server.{module}").addFilter(lambda record: record.msg not in _ALIKE)
        security = Security(settings, of_worker, Buckets(parent.buckets))
        try:
            await serve_models(settings, stop, reload, parent.sockets, of_worker, security, parent)
        except StartError as error:
            if parent.tells:
                raise
            raise SystemExit(1) from error
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
        from ganserve_server.process import serve_models

        endpoint = Endpoint(settings.metrics_address, metrics.registry)
        admin = AdminServer(settings, security)

        def on_serving(facts: Mapping[str, Any], lifecycle: "Lifecycle") -> None:
            log_serving(facts, endpoint.address, admin.start(lifecycle))
            endpoint.why_not_ready = lambda: (
                "draining" if stop.is_set() else "" if lifecycle.serves else "no model is served"
            )

        try:
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
        finally:
            endpoint.close()
    else:
        supervisor = Supervisor(workers, sockets)
        endpoint = Endpoint(settings.metrics_address, supervisor.registry)
        admin = AdminServer(settings, security)
        try:
            meanwhile = asyncio.to_thread(importlib.import_module, "ganserve_server.administration")
            facts, _ = await asyncio.gather(supervisor.start(), meanwhile)
            from ganserve_server.administration import OfAllWorkers

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
    memory = memory_limit() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = memory * 3 // 4 // (_WORKER_BYTES + _BYTES_PER_FILE_BYTE * files)
    return max(1, min(wanted, fitting))


async def _forward_reloads(reload: asyncio.Event, supervisor: Supervisor, security: Security) -> None:
    while True:
        await reload.wait()
        reload.clear()
        with reloading():
            security.refresh()
            supervisor.signal(signal.SIGHUP)


def handle_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event, reload: asyncio.Event) -> None:
    """Set `stop` on SIGTERM and SIGINT, of which a second one ends the process at once, and `reload` on SIGHUP."""

    def begin(number: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin, number)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
